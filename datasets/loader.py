"""Images of a subset, one batch at a time on the device."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch


class ImageReader:
    """uint8 images of some rows of a subset, one batch at a time on the device.

    On CUDA they are kept resident if they fill less than half of the free memory. Otherwise they stay in the mapped
    file and a thread reads, pins and copies one batch ahead.
    """

    def __init__(self, images, rows, device):
        """images uint8 [M, S, S, C] (array or memory map); rows int [n]."""
        self.images, self.rows, self.device = images, np.asarray(rows), device
        size = int(np.prod(images.shape[1:])) * len(self.rows)
        fits = device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 2
        self.resident = (
            torch.empty(len(self.rows), *images.shape[1:], dtype=torch.uint8, device=device)
            if fits
            else None
        )
        for start in range(
            0, len(self.rows) if fits else 0, 1024
        ):  # never all of it in the host's memory
            self.resident[start : start + 1024] = torch.from_numpy(
                images[self.rows[start : start + 1024]]
            )

    def _read(self, positions):
        batch = (
            torch.from_numpy(self.images[self.rows[positions]]).permute(0, 3, 1, 2).contiguous()
        )  # cheap as bytes, dear as floats later
        return (
            batch.pin_memory().to(self.device, non_blocking=True)
            if self.device.type == "cuda"
            else batch
        )

    def __call__(self, batches, part=slice(None)):
        """batches: a list of position lists. Yields (positions, uint8 [B, C, S, S] on the device), the images of `part` of the positions."""
        if self.resident is not None:
            for positions in batches:
                yield (
                    positions,
                    self.resident[
                        torch.as_tensor(positions[part]).to(self.device, non_blocking=True)
                    ].permute(0, 3, 1, 2),
                )
            return
        with ThreadPoolExecutor(max_workers=1) as ahead:
            coming = [ahead.submit(self._read, positions[part]) for positions in batches[:1]]
            for i, positions in enumerate(batches):
                batch = coming.pop().result()
                if i + 1 < len(batches):
                    coming.append(ahead.submit(self._read, batches[i + 1][part]))
                yield positions, batch
