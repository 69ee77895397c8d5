"""Named arrays of an .npz file that any program may have written."""

import zipfile

import numpy as np

from utils.cli import UserError


def load_arrays(path, names, layout):
    """Read numeric arrays from an .npz file, without pickles.

    layout: what the file must hold, for error messages. Returns {name: array}.
    Raises UserError: no such file, no .npz file, a missing array, not numbers, damaged.
    """
    hint = f"--embeddings takes an .npz file with {layout}"
    if not path.exists():
        raise UserError(f"{path}: no such file; {hint}")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: not an .npz file (numpy.savez writes one); {hint}")
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in names if name not in file.files]
            if missing:
                found = ", ".join(file.files) or "none"
                raise UserError(f"{path}: has no array {missing[0]}, only {found}; {hint}")
            arrays = {name: file[name] for name in names}
    except MemoryError:
        raise UserError(f"{path}: declares arrays larger than the memory; {hint}") from None
    except UserError:
        raise
    # a damaged .npz file fails in zipfile, zlib or numpy in many ways
    except Exception as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}; {hint}") from None
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub":
            raise UserError(f"{path}: {name} is {array.dtype}, not numbers; {hint}")
    return arrays


def load_labeled_splits(path, splits):
    """Read features <split> [n, D] and labels <split>_labels [n] from 0 up from an .npz file.

    Returns {split: (float32 [n, D], int64 [n])}. Raises UserError where they do not fit.
    """
    names = [*splits, *(f"{split}_labels" for split in splits)]
    layout = f"{', '.join(splits)} [n, D] and {', '.join(names[len(splits) :])} [n]"
    arrays = load_arrays(path, names, layout)
    first = arrays[splits[0]]
    n_classes = max(2, len(np.unique(arrays[f"{splits[0]}_labels"])))
    for split in splits:
        x, labels = arrays[split], arrays[f"{split}_labels"]
        if x.ndim != 2 or x.shape[1] != first.shape[-1]:
            shapes = f"{split} is {list(x.shape)}, {splits[0]} is {list(first.shape)}"
            raise UserError(f"{path}: {shapes}; make them [n, D] with the same D")
        if labels.shape != x.shape[:1]:
            raise UserError(f"{path}: {split}_labels is {list(labels.shape)}; make it [{len(x)}]")
        if not np.isfinite(x).all():
            raise UserError(f"{path}: {split} holds NaN or infinite values; remove those rows")
        found = np.unique(labels).tolist()
        if len(found) < 2 or found != list(range(n_classes)):
            wanted = " and ".join(map(str, range(n_classes))) if n_classes < 4 else "0 to C-1"
            raise UserError(f"{path}: {split}_labels holds {found[:5]}; it must hold {wanted}")
    return {
        split: (arrays[split].astype(np.float32), arrays[f"{split}_labels"].astype(np.int64))
        for split in splits
    }
