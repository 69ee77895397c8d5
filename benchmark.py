"""Speed, measured as ratios within one run: absolute times differ from machine to machine and from minute to minute.

    python benchmark.py methods                                            seconds per training step, relative to SupCon
    python benchmark.py methods --arch resnet18 --size 32 --batch-size 64  small enough for a CPU
    python benchmark.py losses                                             time and memory against the masked form everyone copies
    python benchmark.py losses --out results/benchmark                     and keep the figures, with provenance
    python benchmark.py metrics --rounds 1                                 time and memory against plain NumPy
    python benchmark.py probe --rounds 1                                   time against scikit-learn's plain use

The forms that are compared take turns: in every round each is divided by the time of the one they are compared with in the same round; the
tables have the median over rounds, lowest and highest. Everything runs on made-up data. A step of `methods` is pretrain.py's own: views,
network, loss, optimizer, on images in memory. `losses` needs pytorch-metric-learning (requirements-test.txt).
"""

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import evaluate_metrics
import linear_probe
import pretrain
from common import (SPLITS, ArgumentParser, ContrastiveModel, ImageBatches, Subset, UserError, antipodal_prototypes, at_least, cli, ntxent_loss,
                    pick_device, precision, provenance, scores, seeded, supcon_loss, supmin_loss, suppro_loss, write_json)

FORMS = ("supcon", "ntxent", "supmin", "suppro", "kcl", "kcl --queue 1024", "tsc", "tsc --variant paper", "sbcl", "bcl", "paco",
         "paco --variant gpaco")                                 # words after --method
WARMED_UP = 3                                                    # of 4 epochs: past TSC's switch and SBCL's clustering
DIM = 128                                                        # of made-up embeddings


def parse_args():
    parser = ArgumentParser("Speed as ratios within one run.", smoke=dict(arch="resnet18", size=8, batch_size=8, steps=1, rounds=2))
    parser.add_argument("what", choices=BENCHMARKS, help="what is measured")
    parser.add_argument("--arch", default="resnet50", help="methods: any torchvision ResNet")
    parser.add_argument("--size", type=at_least(8), default=224, metavar="S", help="methods: side of what the network sees, pixels")
    parser.add_argument("--batch-size", type=at_least(2), default=256, help="methods: images")
    parser.add_argument("--steps", type=at_least(1), default=5, help="methods: timed together, in each round")
    parser.add_argument("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto", help="methods: precision; auto: bf16 where the GPU has it")
    parser.add_argument("--rounds", type=at_least(1), default=5, help="turns of every form")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is one")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the figures are kept, as methods.json or the like (default: printed only)")
    parser.add_argument("--smoke", action="store_true", help="tiny, to see it run")
    return parser.parse_args()


def main():
    args = parse_args()
    device = pick_device(args.device)
    facts = provenance(device)                                   # of the code as it is now, whatever is edited meanwhile
    settings, result = BENCHMARKS[args.what](args, device)
    if args.out:
        path = args.out / f"{args.what}.json"
        write_json(path, {**settings, "rounds": args.rounds, "smoke": args.smoke, args.what: result, "provenance": facts})
        print(f"wrote {path}")


def ratios(seconds, reference):
    """Statistics over rounds of the times of one form, relative to those of another."""
    relative = np.array(seconds) / np.array(reference)
    return {"ratio": float(np.median(relative)), "lowest": float(relative.min()), "highest": float(relative.max()),
            "seconds": float(np.median(seconds))}


# ------------------------------------------------------------------------------------------------------------------
# methods
# ------------------------------------------------------------------------------------------------------------------

def methods(args, device):
    """Time per training step of each, relative to SupCon."""
    _, autocast, scaler = precision(device, args.amp, args.size)
    subset = made_up_subset(args.batch_size * args.steps, args.size)
    train = ImageBatches(subset.images, subset.splits["train"], device)
    runs, seconds = {}, {form: [] for form in FORMS}
    for form in FORMS:
        options = pretrain.parse_args(["made-up", "--method", *form.split(), "--batch-size", str(args.batch_size), "--epochs", "4"])
        torch.manual_seed(0)
        model = ContrastiveModel(args.arch, pretrain.PROJECTION_DIM).to(device)
        method = pretrain.METHODS[options.method](options, subset, model, seeded(0)).to(device)
        optimizer = torch.optim.SGD([p for p in [*model.parameters(), *method.parameters()] if p.requires_grad], lr=1e-3, momentum=0.9)
        runs[form] = options, model, method, optimizer
    with tqdm(total=(1 + args.rounds) * len(FORMS) * args.steps, unit="step", dynamic_ncols=True) as bar:
        for turn in range(1 + args.rounds):                      # the first is not counted: SBCL clusters in it, caches fill
            for form, (options, model, method, optimizer) in runs.items():
                epoch = WARMED_UP if turn else WARMED_UP - 1
                stats = pretrain.train_one_epoch(epoch, args.steps, model, method, optimizer, scaler, autocast, train, subset, options, bar)
                seconds[form] += [stats["seconds"] / args.steps] if turn else []
    result = {}
    for form, (_, _, method, _) in runs.items():
        learned = sum(p.numel() for p in method.parameters() if p.requires_grad)
        result[form] = {**ratios(seconds[form], seconds["supcon"]), "views": method.views, "learned": learned,
                        "kept": sum(t.numel() for t in method.state_dict().values()) - learned}
    print(f"\n{provenance(device)['device']}, {args.arch}, {args.size} px, batch {args.batch_size}, --amp {args.amp}: "
          f"{args.rounds} rounds of {args.steps} steps\n")
    print("| method | views | learned beside the network | kept beside it | time per step, SupCon = 1 (lowest - highest) |\n|---|---|---|---|---|")
    for form, row in result.items():
        print(f"| {form} | {row['views']} | {row['learned']:,} | {row['kept']:,} | {row['ratio']:.2f} ({row['lowest']:.2f} - {row['highest']:.2f}) |")
    return {key: getattr(args, key) for key in ("arch", "size", "batch_size", "steps", "amp")}, result


def made_up_subset(images, size, minority_share=0.05):
    """Noise in the form of a subset: uint8 [images, size, size, 3], all of it training rows."""
    draw = np.random.default_rng(0)
    labels = (np.arange(images) < max(1, images * minority_share)).astype(np.int64)
    rows, counts = np.arange(images), {str(c): int((labels == c).sum()) for c in (0, 1)}
    return Subset(Path("made-up"), "made-up", "95-5", ["majority", "minority"], 1, dict.fromkeys(SPLITS, counts), dict.fromkeys(SPLITS, rows),
                  draw.integers(0, 256, (images, size, size, 3), dtype=np.uint8), labels, np.full((images, 2), size), size, "natural",
                  [0.5] * 3, [0.25] * 3, "", "")


# ------------------------------------------------------------------------------------------------------------------
# losses
# ------------------------------------------------------------------------------------------------------------------

PROTOTYPES = antipodal_prototypes(DIM, seeded(0))
LOSSES = {"masked": lambda z, y: masked_loss(z, y), "ntxent": lambda z, y: ntxent_loss(z), "supcon": supcon_loss,
          "supmin": lambda z, y: supmin_loss(z, y, 1), "suppro": lambda z, y: suppro_loss(z, y, PROTOTYPES),
          "pytorch-metric-learning SupConLoss": lambda z, y: library_loss("SupConLoss", z, y.repeat(2)),
          "pytorch-metric-learning NTXentLoss": lambda z, y: library_loss("NTXentLoss", z, torch.arange(len(z), device=z.device).repeat(2))}


def losses(args, device):
    """Time and peak memory of forward and backward, relative to the masked form."""
    result, sizes, forms = {}, *(((1024,), ("masked", "supcon")) if args.smoke else ((512, 4096, 16384), LOSSES))
    forms = {rows: [form for form in forms if rows <= 512 or "NTXent" not in form] for rows in sizes}        # its memory grows with rows ** 3
    memory = {rows: {form: peak_memory(loss_step, form, rows, device)[0] for form in forms[rows]} for rows in tqdm(sizes, desc="memory")}
    for rows in sizes:
        data = made_up_embeddings(rows, device)
        first = {form: timed(loss_step, form, *data) for form in forms[rows]}            # not counted: caches fill
        seconds = {form: [] for form in first}
        for form in tqdm(list(first) * args.rounds, desc=f"{rows} rows", leave=False):
            seconds[form].append(timed(loss_step, form, *data, times=max(1, int(0.2 / first[form]))))
        result[rows] = {form: {**ratios(seconds[form], seconds["masked"]), "megabytes": memory[rows][form] / 1e6} for form in seconds}
    print(f"\n{provenance(device)['device']}, {DIM} dimensions: {args.rounds} rounds\n")
    print("| rows | form | time, masked = 1 (lowest - highest) | seconds | peak memory, masked = 1 | MB |\n|---|---|---|---|---|---|")
    for rows, form, row in ((rows, form, row) for rows in sizes for form, row in result[rows].items()):
        print(f"| {rows:,} | {form} | {row['ratio']:.2f} ({row['lowest']:.2f} - {row['highest']:.2f}) | {row['seconds']:.4f} | "
              f"{memory[rows][form] / memory[rows]['masked']:.2f} | {row['megabytes']:.0f} |")
    return {"dimensions": DIM}, result


def masked_loss(z, labels, temperature=0.07):
    """The supervised contrastive loss in the form that is copied everywhere, with masks of all views by all views. z [N, V, D]."""
    n, views, _ = z.shape
    contrast = torch.cat(z.unbind(1))
    mask = (labels[:, None] == labels).float().repeat(views, views)
    logits = contrast @ contrast.T / temperature
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    logits_mask = torch.ones_like(mask).scatter(1, torch.arange(n * views, device=z.device)[:, None], 0)
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
# metrics
# ------------------------------------------------------------------------------------------------------------------

METRICS = {"five": lambda z, y: [metric(z, y) for metric in FIVE],
           "five, NumPy": lambda z, y: numpy_five(z.numpy(), y.numpy()),
           "PEU": lambda z, y: evaluate_metrics.entropy_uniformity(z, y, repeats=1),
           "PEU, NumPy, nearest by argmin": lambda z, y: numpy_entropy(z.numpy(), y.numpy(), lambda distance: distance.argmin(1)),
           "PEU, NumPy, nearest by argsort": lambda z, y: numpy_entropy(z.numpy(), y.numpy(), lambda distance: distance.argsort(1)[:, 0].copy())}
FIVE = (evaluate_metrics.sample_alignment_distance, evaluate_metrics.sample_alignment_accuracy, evaluate_metrics.class_alignment_distance,
        evaluate_metrics.class_alignment_consistency, evaluate_metrics.gaussian_potential)


def metrics(args, device):
    """Time and peak memory of the six (PEU: one throw), relative to NumPy with all distances at once, sorted."""
    if device.type == "cuda":
        raise UserError("metrics: compares with NumPy; use --device cpu")
    rows, measured = 1000 if args.smoke else 20000, {form: [] for form in METRICS}
    for form in tqdm(list(METRICS) * (1 if args.smoke else args.rounds), desc="metrics"):
        measured[form].append(peak_memory(metric_step, form, rows, device))
    memory, seconds = ({form: [pair[i] for pair in pairs] for form, pairs in measured.items()} for i in (0, 1))
    for ending, peu in (("", "PEU"), (", NumPy, argmin", "PEU, NumPy, nearest by argmin"), (", NumPy, argsort", "PEU, NumPy, nearest by argsort")):
        five = "five, NumPy" if ending else "five"
        seconds["six" + ending] = [a + b for a, b in zip(seconds[five], seconds[peu])]
        memory["six" + ending] = [max(pair) for pair in zip(memory[five], memory[peu])]
    result = {form: {**ratios(seconds[form], seconds[form.split(",")[0]]), "megabytes": max(memory[form]) / 1e6} for form in seconds}
    print(f"\n{provenance(device)['device']}, 2 views of {rows // 2:,} images, {DIM} dimensions\n")
    print("| metrics | time, ours = 1 (lowest - highest) | seconds | peak memory, MB |\n|---|---|---|---|")
    for form, row in result.items():
        print(f"| {form} | {row['ratio']:.2f} ({row['lowest']:.2f} - {row['highest']:.2f}) | {row['seconds']:.2f} | {row['megabytes']:.0f} |")
    return {"rows": rows, "dimensions": DIM}, result


def metric_step(form, z, labels):
    METRICS[form](z.transpose(0, 1), labels)


def numpy_distances(a, b):
    squared = (a ** 2).sum(1)[:, None] + (b ** 2).sum(1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squared, 0))


def numpy_five(z, labels):
    """All metrics but PEU as one writes them down: one float32 matrix of distances, one full sort. z [V, n, D]; pairs of numbers."""
    views, n, _ = z.shape
    rows, image, label = z.reshape(views * n, -1), np.tile(np.arange(n), views), np.tile(labels, views)
    distance = numpy_distances(rows, rows)
    np.fill_diagonal(distance, np.inf)
    order = distance.argsort(1)
    k = int(0.05 * len(rows))
    sad = np.linalg.norm(z[1:] - z[0], axis=2).mean(0)
    saa = image[order[:, 0]] == image
    cac = (label[order[:, :k]] == label[:, None]).mean(1)
    pairs = [distance[np.ix_(label == c, label == c)] for c in (0, 1)]
    cad = [np.mean(of_class[np.isfinite(of_class)]) for of_class in pairs]
    gpu = [np.exp(-2 * of_class ** 2).sum() / (len(of_class) * (len(of_class) - 1)) for of_class in pairs]
    return [[sad[labels == c].mean() for c in (0, 1)], [100 * saa[label == c].mean() for c in (0, 1)], cad,
            [100 * cac[label == c].mean() for c in (0, 1)], gpu]


def numpy_entropy(z, labels, nearest):
    """One throw of PEU, a few hundred rows at a time: all at once the distances would not fit."""
    rows, label = z.reshape(-1, z.shape[2]), np.tile(labels, len(z))
    points = np.random.default_rng(0).standard_normal((10 * len(rows), rows.shape[1]), dtype=np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    place = np.concatenate([nearest(numpy_distances(some, points)) for some in np.array_split(rows, -(-len(rows) // 250))])
    shares = [np.unique(place[label == c], return_counts=True)[1] / (label == c).sum() for c in (0, 1)]
    return [-100 * (p * np.log2(p)).sum() / np.log2((label == c).sum()) for c, p in enumerate(shares)]


# ------------------------------------------------------------------------------------------------------------------
# probe
# ------------------------------------------------------------------------------------------------------------------

def probe(args, device):
    """The cached probe's fit with its choice of strength, relative to scikit-learn in float64 without warm starts."""
    n, dim = (300, 32) if args.smoke else (15000, 2048)
    (x, y), val, (x_test, y_test) = made_up_features(dim, (n, n // 5, n // 5))
    forms = {"ours": linear_probe.logistic_regression, "scikit-learn": plain_logistic_regression}
    seconds, result = {form: [] for form in forms}, {}
    for form in tqdm(list(forms) * args.rounds, desc="probe"):
        start = time.perf_counter()
        fitted, chosen = forms[form](x, y, *val, 1, linear_probe.STRENGTHS)
        seconds[form].append(time.perf_counter() - start)
        with torch.no_grad():
            result[form] = {**chosen, "test_accuracy": float((fitted(x_test).argmax(1).numpy() == y_test).mean())}
    result = {form: {**ratios(seconds[form], seconds["ours"]), **row} for form, row in result.items()}
    print(f"\n{provenance(device)['device']}, {n:,} x {dim:,} features, {len(linear_probe.STRENGTHS)} strengths\n")
    print("| fit | time, ours = 1 (lowest - highest) | seconds | C | test accuracy, percent |\n|---|---|---|---|---|")
    for form, row in result.items():
        print(f"| {form} | {row['ratio']:.2f} ({row['lowest']:.2f} - {row['highest']:.2f}) | {row['seconds']:.1f} | {row['C']} | "
              f"{100 * row['test_accuracy']:.2f} |")
    return {"images": n, "dimensions": dim}, result


def plain_logistic_regression(x, y, x_val, y_val, minority, strengths):
    """linear_probe.logistic_regression as one writes it down: every strength afresh, float64, to a tolerance of 1e-6."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    fits = {C: make_pipeline(StandardScaler(), LogisticRegression(C=C, class_weight="balanced", max_iter=5000, tol=1e-6)) for C in strengths}
    x, x_val = x.double().numpy(), x_val.double().numpy()
    aurocs = {C: scores(fit.fit(x, y).predict_proba(x_val)[:, 1], y_val, minority)["auroc"] for C, fit in fits.items()}
    C = max(strengths, key=aurocs.get)
    return lambda x: torch.from_numpy(fits[C].predict_proba(x.double().numpy())), {"C": C, "val_auroc": aurocs[C]}


def made_up_features(dim, counts, minority_share=0.05):
    """Features like a pooled ResNet's, correlated and none negative, and labels: a pair (x [n, D], y [n]) for each of the counts.

    Mixtures of dim / 4 hidden factors of falling weight; the minority differs in the mean of a tenth of them.
    """
    generator, factors = seeded(0), dim // 4
    mix = torch.randn(factors, dim, generator=generator) / torch.arange(1, factors + 1).sqrt()[:, None]
    for n in counts:
        y = torch.randperm(n, generator=generator) < n * minority_share
        hidden = torch.randn(n, factors, generator=generator)
        hidden[:, factors // 20: factors // 7] += 0.5 * y[:, None]
        yield (hidden @ mix + 0.3 * torch.randn(n, dim, generator=generator) + 0.5).relu(), y.long().numpy()


# ------------------------------------------------------------------------------------------------------------------
# what losses and metrics share
# ------------------------------------------------------------------------------------------------------------------

def made_up_embeddings(rows, device, minority_share=0.05):
    """Unit vectors z [N, 2, D] whose views are near each other, `rows` in all, and labels [N]."""
    generator, n = seeded(0), rows // 2
    z = torch.randn(n, 1, DIM, generator=generator) + 0.7 * torch.randn(n, 2, DIM, generator=generator)
    return F.normalize(z, dim=2).to(device), (torch.arange(n) < max(2, n * minority_share)).long().to(device)


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
    """Bytes at the peak of a step, beyond what a process holds that did a small one; and its seconds. Measured in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(_peak_memory, step, form, rows, device, torch.get_num_threads()).result()


def _peak_memory(step, form, rows, device, threads):
    import resource
    torch.set_num_threads(threads)
    step(form, *made_up_embeddings(64, device))
    data = made_up_embeddings(rows, device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        seconds = timed(step, form, *data)
        return torch.cuda.max_memory_allocated(device) - before, seconds
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = timed(step, form, *data)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before), seconds         # Linux counts kilobytes


BENCHMARKS = {"methods": methods, "losses": losses, "metrics": metrics, "probe": probe}

if __name__ == "__main__":
    cli(main)
