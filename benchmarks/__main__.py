"""Speed, measured as ratios within one run: absolute times differ from machine to machine and from minute to minute.

    python benchmark.py methods                                            seconds per training step, relative to SupCon
    python benchmark.py methods --arch resnet18 --size 32 --batch-size 64  small enough for a CPU
    python benchmark.py losses                                             time and memory against the masked form everyone copies, share of a step
    python benchmark.py losses --batch-size 4 --out results/benchmark      with few images for a CPU; and keep the figures, with provenance
    python benchmark.py subsets                                            packing 15,120 photographs against a plain Pillow loop
    python benchmark.py pipeline                                           pre-training against its network alone, views against a DataLoader's
    python benchmark.py metrics --rounds 1                                 the six metrics against NumPy's full sort, and their memory

The forms that are compared take turns: in every round each is divided by the time of the one they are compared with in the same round; the
tables have the median over rounds, lowest and highest. Everything runs on made-up data. A step of `methods` is pretrain.py's own: views,
network, loss, optimizer, on images in memory; `pipeline` trains from packed photographs on disk. `losses` needs pytorch-metric-learning
(requirements-test.txt).
"""

import csv
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2
from tqdm import tqdm

import evaluate_metrics
import make_subsets
import pretrain
from common import (
    RECIPES,
    SPLITS,
    ArgumentParser,
    ContrastiveModel,
    ImageReader,
    Stop,
    Subset,
    UserError,
    antipodal_prototypes,
    augment,
    load_subset,
    log_line,
    make_generator,
    normalize,
    ntxent_loss,
    number_from,
    pick_device,
    precision,
    provenance,
    run_main,
    sha256,
    supcon_loss,
    supmin_loss,
    suppro_loss,
    write_json,
)

FORMS = (
    "supcon",
    "ntxent",
    "supmin",
    "suppro",
    "kcl",
    "kcl --queue 1024",
    "tsc",
    "tsc --variant paper",
    "sbcl",
    "bcl",
    "paco",
    "paco --variant gpaco",
)  # words after --method
WARMED_UP = 3  # of 4 epochs: past TSC's switch and SBCL's clustering
DIM = 128  # of made-up embeddings


def parse_args():
    parser = ArgumentParser(
        "Speed as ratios within one run.",
        smoke=dict(arch="resnet18", size=8, batch_size=8, steps=1, rows=1000, rounds=2),
    )
    parser.add_argument("what", choices=BENCHMARKS, help="what is measured")
    parser.add_argument(
        "--arch",
        default="resnet50",
        help="methods, losses, pipeline: any torchvision ResNet",
    )
    parser.add_argument(
        "--size",
        type=number_from(8),
        default=224,
        metavar="S",
        help="methods, losses: side of what the network sees, pixels",
    )
    parser.add_argument(
        "--batch-size",
        type=number_from(2),
        default=256,
        help="methods, losses, pipeline: images",
    )
    parser.add_argument(
        "--steps",
        type=number_from(1),
        default=5,
        help="methods, pipeline: timed together, in each round",
    )
    parser.add_argument(
        "--amp",
        choices=["auto", "off", "bf16", "fp16"],
        default="auto",
        help="of the network: auto is bf16 where the GPU has it",
    )
    parser.add_argument(
        "--rows",
        type=number_from(1000),
        default=20000,
        help="metrics: embeddings, half of them second views",
    )
    parser.add_argument("--rounds", type=number_from(1), default=5, help="turns of every form")
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto: CUDA where there is one",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where the figures are kept, as methods.json or the like (default: printed only)",
    )
    parser.add_argument("--smoke", action="store_true", help="tiny, to see it run")
    return parser.parse_args()


def main():
    args = parse_args()
    device = pick_device(args.device)
    facts = provenance(device)  # of the code as it is now, whatever is edited meanwhile
    settings, result = BENCHMARKS[args.what](args, device)
    if args.out:
        path = args.out / f"{args.what}.json"
        write_json(
            path,
            {
                **settings,
                "rounds": args.rounds,
                "smoke": args.smoke,
                args.what: result,
                "provenance": facts,
            },
        )
        print(f"wrote {path}")


def ratios(seconds, reference):
    """Statistics over rounds of the times of one form, relative to those of another."""
    relative = np.array(seconds) / np.array(reference)
    return {
        "ratio": float(np.median(relative)),
        "lowest": float(relative.min()),
        "highest": float(relative.max()),
        "seconds": float(np.median(seconds)),
    }


# ------------------------------------------------------------------------------------------------------------------
# methods
# ------------------------------------------------------------------------------------------------------------------


def methods(args, device):
    """Time per training step of each, relative to SupCon."""
    _, autocast, scaler = precision(device, args.amp, args.size)
    subset = made_up_subset(args.batch_size * args.steps, args.size)
    train = ImageReader(subset.images, subset.splits["train"], device)
    runs, seconds = {}, {form: [] for form in FORMS}
    for form in FORMS:
        runs[form] = training(form, args, device, subset)
    with tqdm(
        total=(1 + args.rounds) * len(FORMS) * args.steps, unit="step", dynamic_ncols=True
    ) as bar:
        for turn in range(
            1 + args.rounds
        ):  # the first is not counted: SBCL clusters in it, caches fill
            for form, (options, model, method, optimizer) in runs.items():
                epoch = WARMED_UP if turn else WARMED_UP - 1
                stats = pretrain.train_one_epoch(
                    epoch,
                    args.steps,
                    model,
                    method,
                    optimizer,
                    scaler,
                    autocast,
                    train,
                    subset,
                    options,
                    None,
                    bar,
                    Stop(),
                )
                seconds[form] += [stats["seconds"] / args.steps] if turn else []
    result = {}
    for form, (_, _, method, _) in runs.items():
        learned = sum(p.numel() for p in method.parameters() if p.requires_grad)
        result[form] = {
            **ratios(seconds[form], seconds["supcon"]),
            "views": method.views,
            "learned": learned,
            "kept": sum(t.numel() for t in method.state_dict().values()) - learned,
        }
    print(
        f"\n{provenance(device)['device']}, {args.arch}, {args.size} px, batch {args.batch_size}, --amp {args.amp}: "
        f"{args.rounds} rounds of {args.steps} steps\n"
    )
    print(
        "| method | views | learned beside the network | kept beside it | time per step, SupCon = 1 (lowest - highest) |\n|---|---|---|---|---|"
    )
    for form, row in result.items():
        print(
            f"| {form} | {row['views']} | {row['learned']:,} | {row['kept']:,} | {row['ratio']:.2f} ({row['lowest']:.2f} - {row['highest']:.2f}) |"
        )
    return {
        key: getattr(args, key) for key in ("arch", "size", "batch_size", "steps", "amp")
    }, result


def training(form, args, device, subset):
    """What pretrain.py trains by a method and its flags: (options, model, method, optimizer)."""
    options = pretrain.parse_args(
        [
            "made-up",
            "--method",
            *form.split(),
            "--batch-size",
            str(args.batch_size),
            "--epochs",
            "4",
        ]
    )
    torch.manual_seed(0)
    model = ContrastiveModel(args.arch, pretrain.PROJECTION_DIM).to(device)
    method = pretrain.METHODS[options.method](options, subset, model, make_generator(0)).to(device)
    optimizer = torch.optim.SGD(
        [p for p in [*model.parameters(), *method.parameters()] if p.requires_grad],
        lr=1e-3,
        momentum=0.9,
    )
    return options, model, method, optimizer


def made_up_subset(images, size, minority_share=0.05):
    """Noise in the form of a subset: uint8 [images, size, size, 3], all of it training rows."""
    draw = np.random.default_rng(0)
    labels = (np.arange(images) < max(1, images * minority_share)).astype(np.int64)
    rows, counts = np.arange(images), {str(c): int((labels == c).sum()) for c in (0, 1)}
    return Subset(
        Path("made-up"),
        "made-up",
        "95-5",
        ["majority", "minority"],
        1,
        dict.fromkeys(SPLITS, counts),
        dict.fromkeys(SPLITS, rows),
        draw.integers(0, 256, (images, size, size, 3), dtype=np.uint8),
        labels,
        np.full((images, 2), size),
        size,
        "natural",
        [0.5] * 3,
        [0.25] * 3,
        "",
        "",
    )


# ------------------------------------------------------------------------------------------------------------------
# losses
# ------------------------------------------------------------------------------------------------------------------

PROTOTYPES = antipodal_prototypes(DIM, make_generator(0))
LOSSES = {
    "masked": lambda z, y: masked_loss(z, y),
    "ntxent": lambda z, y: ntxent_loss(z),
    "supcon": supcon_loss,
    "supmin": lambda z, y: supmin_loss(z, y, 1),
    "suppro": lambda z, y: suppro_loss(z, y, PROTOTYPES),
    "pytorch-metric-learning SupConLoss": lambda z, y: library_loss("SupConLoss", z, y.repeat(2)),
    "pytorch-metric-learning NTXentLoss": lambda z, y: library_loss(
        "NTXentLoss", z, torch.arange(len(z), device=z.device).repeat(2)
    ),
}


def losses(args, device):
    """Time and peak memory of forward and backward, relative to the masked form, and the share of a step with the network."""
    result, sizes, forms = (
        {},
        *(((1024,), ("masked", "supcon")) if args.smoke else ((512, 4096, 16384), LOSSES)),
    )
    forms = {
        rows: [form for form in forms if rows <= 512 or "NTXent" not in form] for rows in sizes
    }  # its memory grows with rows ** 3
    memory = {
        rows: {form: peak_memory(loss_step, form, rows, device) for form in forms[rows]}
        for rows in tqdm(sizes, desc="memory")
    }
    view = seconds_per_view(args, device)
    for rows in sizes:
        data = made_up_embeddings(rows, device)
        first = {
            form: timed(loss_step, form, *data) for form in forms[rows]
        }  # not counted: caches fill
        seconds = {form: [] for form in first}
        for form in tqdm(list(first) * args.rounds, desc=f"{rows} rows", leave=False):
            seconds[form].append(
                timed(loss_step, form, *data, times=max(1, int(0.2 / first[form])))
            )
        result[rows] = {
            form: {
                **ratios(seconds[form], seconds["masked"]),
                "megabytes": memory[rows][form] / 1e6,
            }
            for form in seconds
        }
        for row in result[rows].values():
            row["percent_of_step"] = 100 * row["seconds"] / (rows * view + row["seconds"])
    print(
        f"\n{provenance(device)['device']}, {DIM} dimensions: {args.rounds} rounds; a view through {args.arch} at {args.size} px: {view:.5f} s\n"
    )
    print(
        "| rows | form | time, masked = 1 (lowest - highest) | seconds | % of a step with the network | peak memory, masked = 1 | MB |"
    )
    print("|---|---|---|---|---|---|---|")
    for rows, form, row in (
        (rows, form, row) for rows in sizes for form, row in result[rows].items()
    ):
        print(
            f"| {rows:,} | {form} | {row['ratio']:.2f} ({row['lowest']:.2f} - {row['highest']:.2f}) | {row['seconds']:.4f} | "
            f"{row['percent_of_step']:.3f} | {memory[rows][form] / memory[rows]['masked']:.2f} | {row['megabytes']:.0f} |"
        )
    return {
        "dimensions": DIM,
        "arch": args.arch,
        "size": args.size,
        "batch_size": args.batch_size,
        "seconds_per_view": view,
    }, result


def seconds_per_view(args, device):
    """Of forward and backward through the network in training, without views, loss and optimizer."""
    _, autocast, _ = precision(device, args.amp, args.size)
    model = ContrastiveModel(args.arch, pretrain.PROJECTION_DIM).to(device)
    views = torch.randn(2, args.batch_size, 3, args.size, args.size, device=device)

    def step():
        with autocast:
            z = model(views)
        z.sum().backward()

    return float(np.median([timed(step) for _ in range(1 + args.rounds)][1:])) / (
        2 * args.batch_size
    )


def masked_loss(z, labels, temperature=0.07):
    """The supervised contrastive loss in the form that is copied everywhere, with masks of all views by all views. z [N, V, D]."""
    n, views, _ = z.shape
    contrast = torch.cat(z.unbind(1))
    mask = (labels[:, None] == labels).float().repeat(views, views)
    logits = contrast @ contrast.T / temperature
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    logits_mask = torch.ones_like(mask).scatter(
        1, torch.arange(n * views, device=z.device)[:, None], 0
    )
    mask = mask * logits_mask
    exp_logits = logits.exp() * logits_mask
    log_prob = logits - exp_logits.sum(1, keepdim=True).log()
    return -((mask * log_prob).sum(1) / mask.sum(1)).mean()


def library_loss(name, z, labels):
    from pytorch_metric_learning import losses as library

    return getattr(library, name)(temperature=0.07)(z.transpose(0, 1).flatten(0, 1), labels)


def loss_step(form, z, labels):
    z = z.requires_grad_()
    z.grad = None
    LOSSES[form](z, labels).backward()


# ------------------------------------------------------------------------------------------------------------------
# subsets
# ------------------------------------------------------------------------------------------------------------------


def subsets(args, device):
    """Packing of a made-up iNaturalist against a plain Pillow loop, its memory, a kill and a restart, one worker and all."""
    with tempfile.TemporaryDirectory(prefix="subsets-") as folder:
        root, n = Path(folder), 240 if args.smoke else 15120
        files = made_up_photographs(root, n // 70)
        plain, packed = one_core(root, files[:: max(1, n // 1000)], args.rounds)
        command = [
            sys.executable,
            Path(__file__).with_name("make_subsets.py"),
            "inat21-mammals",
            "--data-root",
            root,
            "--ratios",
            "natural",
        ]
        runs = {}
        for name, more in (("one worker", ["--workers", "1"]), ("all workers", [])):
            start = time.time()
            memory = peak_of(
                subprocess.Popen(
                    [*command, *more, "--out", root / name],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
            runs[name] = {"seconds": time.time() - start, "peak_mib": memory}
        killed = subprocess.Popen(
            [*command, "--out", root / "killed"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(runs["all workers"]["seconds"] / 2)
        killed.kill()
        killed.wait()
        again = subprocess.run(
            [*command, "--out", root / "killed"], capture_output=True, text=True, check=True
        ).stdout.splitlines()[0]
        bytes_of = [
            {
                file: sha256(root / name / "inat21-mammals" / file)
                for file in ("images.npy", "index.csv")
            }
            for name in (*runs, "killed")
        ]
        if not bytes_of[0] == bytes_of[1] == bytes_of[2]:
            raise UserError("the packed bytes depend on the number of workers, or on a kill")
        result = {
            "images": len(files),
            "bytes": sum(path.stat().st_size for path in files),
            "one core": ratios(packed, plain),
            **runs,
            "after a kill": again,
        }
    print(
        f"\n{len(files)} JPEGs, one core: {result['one core']['ratio']:.2f} of the time of a plain Pillow loop "
        f"({result['one core']['lowest']:.2f} - {result['one core']['highest']:.2f})"
    )
    print(
        *(
            f"{name}: {run['seconds']:.0f} s, {run['peak_mib']:.0f} MiB at most"
            for name, run in runs.items()
        ),
        sep="\n",
    )
    print(f"after a kill: {again}; same bytes")
    return {}, result


def made_up_photographs(root, categories):
    """A made-up iNaturalist of so many categories, 70 photographs each. Returns their paths."""
    with ProcessPoolExecutor() as pool:
        made = tqdm(
            pool.map(made_up_category, [root] * categories, range(categories)),
            total=categories,
            desc="photographs",
        )
        return [path for paths in made for path in paths]


def made_up_category(root, i):
    """Writes 60 training and 10 validation photographs of one category, up to 500 px, in iNaturalist's layout. Returns their paths."""
    order, paths = "Artiodactyla" if i % 3 == 0 else "Carnivora", []
    for part, n in (("train", 60), ("val", 10)):
        folder = (
            root
            / part
            / f"{i:05d}_Animalia_Chordata_Mammalia_{order}_Family{i % 20}_Genus{i % 100}_species{i}"
        )
        folder.mkdir(parents=True)
        for k in range(n):
            draw = np.random.default_rng([i, k, n])
            width, height = [(500, 375), (375, 500), (500, 333), (500, 500)][draw.integers(4)]
            coarse = Image.fromarray(
                draw.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
            ).resize((width, height))
            noisy = np.asarray(coarse) + draw.normal(0, 12, (height, width, 1))
            paths.append(folder / f"{k:03d}.jpg")
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=85)
    return paths


def one_core(root, files, rounds):
    """Seconds per round of a plain Pillow loop and of make_subsets.pack_block over the same files, taking turns."""
    side, plain, packed = 320, [], []
    path = root / "one-core.npy"
    offset = np.lib.format.open_memmap(
        path, mode="w+", dtype=np.uint8, shape=(len(files), side, side, 3)
    ).offset
    for _ in range(rounds):
        start = time.perf_counter()
        for file in files:
            np.asarray(
                Image.open(file).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            )
        plain.append(time.perf_counter() - start)
        start = time.perf_counter()
        for at in range(0, len(files), make_subsets.CHUNK):
            make_subsets.pack_block(
                (path, offset, at, files[at : at + make_subsets.CHUNK], side, 3, False)
            )
        packed.append(time.perf_counter() - start)
    return plain, packed


def peak_of(process):
    """MiB that a process and its children use at most, shared pages counted once (Linux: proportional set size), until it ends."""
    peak = 0
    while process.poll() is None:
        members = [
            process.pid,
            *(
                int(pid)
                for task in Path(f"/proc/{process.pid}/task").glob("*/children")
                for pid in task.read_text().split()
            ),
        ]
        try:
            sizes = [
                re.search(
                    r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE
                )
                for pid in members
            ]
        except (FileNotFoundError, ProcessLookupError):  # one has ended just now
            continue
        peak = max(peak, sum(int(size[1]) for size in sizes if size) / 1024)
        time.sleep(0.2)
    if process.returncode:
        raise UserError(f"{' '.join(map(str, process.args))}: exit code {process.returncode}")
    return peak


# ------------------------------------------------------------------------------------------------------------------
# pipeline
# ------------------------------------------------------------------------------------------------------------------


def pipeline(args, device):
    """Pre-training from disk relative to its network alone and its views relative to a DataLoader's, per size."""
    result = {}
    with tempfile.TemporaryDirectory(prefix="pipeline-") as folder:
        root = Path(folder)
        made_up_photographs(
            root, max(2, -(-args.batch_size * args.steps // 50))
        )  # of 60 training images a category, some go to val
        for size in (args.size,) if args.smoke else (28, 64, 224):
            command = [
                "inat21-mammals",
                "--data-root",
                root,
                "--size",
                str(size),
                "--ratios",
                "natural",
                "--out",
                root / str(size),
            ]
            subprocess.run(
                [sys.executable, Path(make_subsets.__file__), *command],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                check=True,
            )
            subset = load_subset(root / str(size) / "inat21-mammals/natural.json")
            step, compiled = step_ratios(args, device, subset, root)
            result[size] = {
                "step": step,
                "compiled": compiled,
                "views": view_ratios(args, device, subset, root),
            }
    print(
        f"\n{provenance(device)['device']}, {args.arch}, batch {args.batch_size}, --amp {args.amp}: {args.rounds} rounds of {args.steps} steps\n"
    )
    print(
        "| pixels | images per second | of the network alone | network alone, compiled | of it plain | views per second | of a DataLoader |"
    )
    print("|---|---|---|---|---|---|---|")
    for size, row in result.items():
        print(
            f"| {size} | "
            + " | ".join(
                f"{row[what]['per second']:.0f} | {row[what]['ratio']:.2f} ({row[what]['lowest']:.2f} - "
                f"{row[what]['highest']:.2f})"
                for what in row
            )
            + " |"
        )
    return {key: getattr(args, key) for key in ("arch", "batch_size", "steps", "amp")}, result


def step_ratios(args, device, subset, folder):
    """Throughput of the same steps on one batch of finished views: (of pretrain.py's epoch, its line of the log included; under torch.compile)."""
    _, autocast, scaler = precision(device, args.amp, subset.size)
    options, model, method, optimizer = training("supcon", args, device, subset)
    train = ImageReader(subset.images, subset.splits["train"], device)
    views = torch.randn(2, args.batch_size, 3, subset.size, subset.size, device=device)
    labels = torch.arange(args.batch_size, device=device) % 2

    def real():
        stats = pretrain.train_one_epoch(
            0,
            args.steps,
            model,
            method,
            optimizer,
            scaler,
            autocast,
            train,
            subset,
            options,
            folder,
            bar,
            Stop(),
        )
        log_line(folder, **stats)

    def resident(network):
        for _ in range(args.steps):
            with autocast:
                loss = method(network, views, labels, None, None)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    compiled, images = (
        model if args.smoke else torch.compile(model, dynamic=False),
        args.steps * args.batch_size,
    )
    with tqdm(total=(1 + args.rounds) * args.steps, desc=f"{subset.size} px", unit="step") as bar:
        alone, trained, faster = zip(
            *(
                (timed(resident, model), timed(real), timed(resident, compiled))
                for _ in range(1 + args.rounds)
            )
        )
    return per_second(alone[1:], trained[1:], images), per_second(alone[1:], faster[1:], images)


def view_ratios(args, device, subset, root):
    """Throughput of two augmented views per image, normalised, relative to a DataLoader with as many workers as this process has threads."""
    rows, recipe, generator = (
        subset.splits["train"][: args.batch_size * args.steps],
        RECIPES[subset.recipe],
        make_generator(0),
    )
    with open(subset.path.with_name("index.csv"), newline="", encoding="utf-8") as file:
        names = [row["source"] for row in csv.DictReader(file)]
    train, batches = (
        ImageReader(subset.images, rows, device),
        np.split(np.arange(len(rows)), args.steps),
    )
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(subset.size, scale=recipe["area"]),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(*recipe["jitter"])], recipe["p_jitter"]),
            v2.RandomGrayscale(recipe["p_gray"]),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(subset.mean, subset.std),
        ]
    )
    loader = torch.utils.data.DataLoader(
        TwoViews([root / names[row] for row in rows], transform),
        args.batch_size,
        num_workers=torch.get_num_threads(),
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )

    def ours():
        for positions, images in train(batches):
            sizes = torch.from_numpy(subset.sizes[rows[positions]])
            normalize(
                torch.cat(
                    [
                        augment(images, sizes, subset.recipe, subset.size, generator)
                        for _ in range(2)
                    ]
                ),
                subset.mean,
                subset.std,
            )

    def theirs():
        for views in loader:
            torch.cat(views).to(device, non_blocking=True)

    usual, packed = zip(*((timed(theirs), timed(ours)) for _ in range(1 + args.rounds)))
    return per_second(usual[1:], packed[1:], 2 * len(rows))


class TwoViews(torch.utils.data.Dataset):
    """The usual way: an image is opened and decoded for each batch, and goes through the transforms twice."""

    def __init__(self, files, transform):
        self.files, self.transform = files, transform

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        image = Image.open(self.files[i]).convert("RGB")
        return self.transform(image), self.transform(image)


def per_second(reference, seconds, n):
    """Statistics over rounds of the throughput of n things, relative to that of a reference."""
    times = ratios(reference, seconds)
    return {
        **times,
        "seconds": float(np.median(seconds)),
        "per second": n / float(np.median(seconds)),
    }


# ------------------------------------------------------------------------------------------------------------------
# metrics
# ------------------------------------------------------------------------------------------------------------------

METRICS = {
    "SAD": evaluate_metrics.sample_alignment_distance,
    "SAA": evaluate_metrics.sample_alignment_accuracy,
    "CAD": evaluate_metrics.class_alignment_distance,
    "CAC": evaluate_metrics.class_alignment_consistency,
    "GPU": evaluate_metrics.gaussian_potential,
    "PEU": lambda z, y: evaluate_metrics.entropy_uniformity(z, y, repeats=1),
}
ANCHORS = 1000  # NumPy's time is that of so many rows, or a few more, times what all are of them


def metrics(args, device):
    """Time of the six metrics and their peak memory; time relative to NumPy that sorts all distances."""
    rows, numpy = args.rows, {"SAD SAA CAD CAC GPU": numpy_five, "PEU": numpy_entropy}
    memory = {
        name: peak_memory(metric_step, name, rows, device)
        for name in tqdm(list(METRICS)[: 1 if args.smoke else 6], desc="memory")
    }
    z, y = made_up_embeddings(rows, device)
    seconds, theirs = {name: [] for name in METRICS}, {name: [] for name in numpy}
    for _ in tqdm(range(args.rounds), desc="rounds"):
        for name in METRICS:
            seconds[name].append(timed(metric_step, name, z, y))
        for name, function in numpy.items():
            theirs[name].append(
                rows
                // ANCHORS
                * timed(
                    function,
                    z.transpose(0, 1).flatten(0, 1).cpu().numpy(),
                    y.repeat(2).cpu().numpy(),
                )
            )
    five, peu = (np.array(theirs[name]) for name in numpy)
    ours = np.sum([seconds[name] for name in list(METRICS)[:5]], axis=0)
    result = {
        name: {
            "seconds": float(np.median(seconds[name])),
            **({"megabytes": memory[name] / 1e6} if name in memory else {}),
        }
        for name in METRICS
    }
    result["speed"] = {
        "SAD SAA CAD CAC GPU": ratios(five, ours),
        "PEU, one throw": ratios(peu, seconds["PEU"]),
        "all six, PEU with five throws": ratios(
            five + 5 * peu, ours + 5 * np.array(seconds["PEU"])
        ),
    }
    print(
        f"\n{provenance(device)['device']}, 2 x {rows // 2:,} rows of {DIM} dimensions: {args.rounds} rounds\n"
    )
    print(
        *(
            f"{name}: {result[name]['seconds']:.1f} s"
            + (f", {memory[name] / 1e6:.0f} MB" if name in memory else "")
            for name in METRICS
        ),
        sep="\n",
    )
    for name, row in result["speed"].items():
        print(
            f"{name}: {row['ratio']:.1f} times as fast as NumPy ({row['lowest']:.1f} - {row['highest']:.1f})"
        )
    return {"rows": rows, "dimensions": DIM}, result


def metric_step(name, z, labels):
    METRICS[name](z.transpose(0, 1), labels)


def numpy_sorted(rows, others):
    """Distances [a, M] and the order of each row, in NumPy's usual float64."""
    squared = (rows**2).sum(1)[:, None] + (others**2).sum(1) - 2 * rows @ others.T
    distance = np.sqrt(np.maximum(squared, 0))
    return distance, distance.argsort(axis=1)


def numpy_five(rows, labels):
    """The five metrics of some rows as one writes them down, of two views: one matrix of distances and one full sort for all."""
    rows, n, k = rows.astype(np.float64), len(rows) // 2, len(rows) // 20
    for anchors in np.array_split(np.arange(0, len(rows), len(rows) // ANCHORS), 5):
        distance, order = numpy_sorted(rows[anchors], rows)
        same = labels[anchors, None] == labels
        (
            (order[:, 1] % n == anchors % n).mean(),
            np.take_along_axis(same, order[:, 1 : k + 1], axis=1).mean(1),
        )
        np.where(same, distance, 0).mean(1), np.where(same, np.exp(-2 * distance**2), 0).mean(1)


def numpy_entropy(rows, labels):
    """One throw of PEU for some rows."""
    some = slice(None, None, len(rows) // ANCHORS)
    points = np.random.default_rng(0).standard_normal((10 * len(rows), rows.shape[1]))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    place = np.concatenate(
        [
            numpy_sorted(part, points)[1][:, 0].copy()
            for part in np.array_split(rows[some].astype(np.float64), 10)
        ]
    )
    for c in (0, 1):
        p = np.unique(place[labels[some] == c], return_counts=True)[1] / len(place)
        -(p * np.log2(p)).sum()


# ------------------------------------------------------------------------------------------------------------------
# what they share
# ------------------------------------------------------------------------------------------------------------------


def made_up_embeddings(rows, device, minority_share=0.05):
    """Unit vectors z [N, 2, D] whose views are near each other, `rows` in all, and labels [N]."""
    generator, n = make_generator(0), rows // 2
    z = torch.randn(n, 1, DIM, generator=generator) + 0.7 * torch.randn(
        n, 2, DIM, generator=generator
    )
    return F.normalize(z, dim=2).to(device), (
        torch.arange(n) < max(2, n * minority_share)
    ).long().to(device)


def timed(step, *data, times=1):
    """Seconds of a step, mean of a few `times`."""

    def now():
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    start = now()
    for _ in range(times):
        step(*data)
    return (now() - start) / times


def peak_memory(step, form, rows, device):
    """Bytes at the peak of a step, beyond what a process holds that did a small one. Measured in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(
            _peak_memory, step, form, rows, device, torch.get_num_threads()
        ).result()


def _peak_memory(step, form, rows, device, threads):
    torch.set_num_threads(threads)
    step(form, *made_up_embeddings(64, device))
    data = made_up_embeddings(rows, device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step(form, *data)
        return torch.cuda.max_memory_allocated(device) - before
    before = peak_resident()
    step(form, *data)
    return peak_resident() - before


def peak_resident():
    """Bytes of memory that this process has had at most (Linux). getrusage would count what its parent had, too."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


BENCHMARKS = {
    "methods": methods,
    "losses": losses,
    "subsets": subsets,
    "pipeline": pipeline,
    "metrics": metrics,
}

if __name__ == "__main__":
    run_main(main)
