"""The paper's claims, and the questions it leaves open: texts, rules, and who may judge them.

    python report.py runs --claims --out results  # README.md, cases.md and figures

Each claim has one primary case per data set. It stands in claims_rules.py before the runs are
made. The verdict rests on the primary cases alone, with Holm's correction over the data sets. All
other cases are "also measured", beside the number that chance gives.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from reporting import claims_rules as rules
from reporting.claims_runs import find_regimes, may_judge
from reporting.claims_statistics import TOLERANCE, decide, verdict

NOT_LOWER = (
    f"is not below {{}}: the lower bound of the 95 % interval is above -{TOLERANCE:g} points"
)
ADVISED = (
    "the loss that the paper advises (Supervised Prototypes on medical images, else "
    "Supervised Minority)"
)


def no_cases(regime):
    return ()


@dataclass
class Claim:
    """One claim. `primary` returns a Case or None, `others` an iterable of Cases, per regime."""

    letter: str
    text: str
    rule: str
    needs: str  # the runs that decide it on one data set
    arms: int  # their number of settings, for the price; 0: no training
    primary: Callable
    others: Callable[..., Iterable] = no_cases


CLAIMS = (
    Claim(
        "a",
        "SupCon's accuracy falls as imbalance grows.",
        "SupCon at 50-50 is above SupCon at the rarest ratio.",
        "SupCon at 50-50 and at 99-1",
        2,
        rules.judge_fall,
    ),
    Claim(
        "a2",
        "With a rare minority SupCon is no better than an untrained network.",
        f"At the rarest ratio: the untrained network {NOT_LOWER.format('SupCon')}.",
        "SupCon at 99-1 and the same with --lr 0",
        2,
        rules.judge_floor,
        rules.measure_floor,
    ),
    Claim(
        "b",
        "SAA and CAC show the collapse; also measured: SAD, CAD, GPU and PEU hide it.",
        "At the rarest ratio: SAA and CAC of SupCon are both below those of both losses (mean of "
        "the classes, in the projection). Also measured: each other metric calls SupCon better "
        "than both (lower SAD, CAD and GPU, higher PEU). The verdict is about SAA and CAC.",
        "SupCon and both losses at 99-1, with evaluate_metrics.py",
        3,
        rules.judge_class_metrics,
        rules.measure_other_metrics,
    ),
    Claim(
        "c",
        "Supervised Minority and Supervised Prototypes repair it.",
        "At the rarest ratio: both are above SupCon. The paper's size, up to 35 points, is not "
        "claimed; the tables show the sizes found.",
        "SupCon and both losses at 99-1",
        3,
        rules.judge_repairs,
        rules.measure_repairs,
    ),
    Claim(
        "c2",
        "They are above the long-tail methods.",
        f"At the rarest ratio: {ADVISED} is above each of KCL, TSC, SBC, BCL and PaCo that was "
        "run. The paper's size, up to 5 points, is not claimed.",
        "both losses and five long-tail methods at 99-1",
        7,
        rules.judge_long_tail,
        rules.measure_long_tail,
    ),
    Claim(
        "d",
        "Supervised Minority is better on natural images, Supervised Prototypes on medical ones.",
        "At the rarest ratio the advised loss is above the other one. A data set counts as natural "
        "or medical only if its images and its recipe of augmentation are both of that kind.",
        "both losses on two natural and two medical data sets",
        2,
        rules.judge_domain,
        rules.measure_domain,
    ),
    Claim(
        "e",
        "CAC predicts accuracy, R² > 0.6.",
        "R² of the probe's scores on CAC (mean of the classes) over the base settings of a data "
        f"set, at least {rules.CAC_CELLS}: its 95 % interval is above 0.6 and the slope is "
        "positive. The interval draws settings with replacement.",
        "eight settings: four methods at two ratios",
        8,
        rules.judge_cac,
    ),
    Claim(
        "f",
        "Larger batches hurt SupCon.",
        "At an equal number of steps (to 15 %) and the same learning rate: SupCon with the "
        "smallest batch is above SupCon with the largest.",
        "SupCon at 99-1 with two more batch sizes and equal steps",
        2,
        rules.judge_batch_sizes,
    ),
    Claim(
        "g",
        "The overhead of the two losses is negligible.",
        f"Both take at most {rules.OVERHEAD} times SupCon's time per step in every round of the "
        "benchmark (results/benchmark/methods.json). The range of n rounds holds the "
        "median with probability 1 - 2^(1-n).",
        "python -m benchmarks methods --out results/benchmark",
        0,
        rules.judge_overhead,
    ),
    Claim(
        "h",
        "At 50-50 the two losses cost nothing.",
        f"Each {NOT_LOWER.format('SupCon')}.",
        "SupCon and both losses at 50-50",
        3,
        rules.judge_balanced_data,
    ),
    Claim(
        "i",
        "Open: is 0.5 (margin 1) the right threshold of the prototypes?",
        f"At the rarest ratio with other margins: margin 1 {NOT_LOWER.format('any of them')}.",
        "Supervised Prototypes at 99-1 with margins 0, 0.5 and 2",
        3,
        rules.judge_margin,
    ),
    Claim(
        "j",
        "Open: is it best to leave the majority without supervision?",
        f"At the rarest ratio: a supervised share of 0 {NOT_LOWER.format('any other share')}.",
        "Supervised Minority at 99-1 with shares 0.25, 0.5 and 0.75",
        3,
        rules.judge_majority_supervision,
    ),
    Claim(
        "k",
        "Open: are the losses better than LDAM-DRW and cRT at equal views?",
        f"At the rarest ratio: {ADVISED}, probed on the run's own rows, is above both. The budget "
        "is equal in views of images: supervised runs take twice the epochs. It is not equal in "
        "choice: they keep the best epoch on validation, contrastive runs the last one.",
        "LDAM-DRW, CE and cRT at 99-1 for twice the epochs",
        2,
        rules.judge_supervised,
        rules.measure_supervised,
    ),
    Claim(
        "l",
        "Open: is there a number, early in training, that tells which method to use?",
        "The number is validation kNN accuracy between a quarter and half of the training. SupCon "
        "or a loss of the paper is chosen by it, seed by seed, at the rarest ratio. That is above "
        "always taking the better of the two losses. Also measured: the same by CAC.",
        "SupCon and both losses at 99-1",
        3,
        rules.judge_early_choice,
        rules.measure_early_choice,
    ),
    Claim(
        "m",
        "Open: does a sampler that guarantees minority images change the picture?",
        "SupCon with the sampler is above SupCon without it. Also measured: with it, it "
        f"{NOT_LOWER.format('either loss without it')}.",
        "SupCon at 99-1 with --minority-per-batch 4",
        1,
        rules.judge_sampler,
        rules.measure_sampler,
    ),
    Claim(
        "n",
        "Open: does a ReLU after the head, or the minority in every batch, repair SupCon as well "
        "as the paper's losses?",
        f"SupCon with --relu {NOT_LOWER.format('the advised loss')}. Also measured: the same with "
        "the sampler, and the ReLU against plain SupCon.",
        "SupCon at 99-1 with --relu, and with --minority-per-batch 4",
        2,
        rules.judge_relu,
        rules.measure_relu,
    ),
    Claim(
        "o",
        "Open: are contrastive encoders better than AUC-margin training at equal views?",
        "At the rarest ratio: the advised loss, probed on the run's own rows, is above a network "
        "that finetune.py --loss auc_margin trains from scratch for twice the epochs. Also "
        "measured: the other encoders, and AUC-margin training from each against that from CE.",
        "AUC-margin from scratch at 99-1 for twice the epochs",
        1,
        rules.judge_auc_margin,
        rules.measure_auc_margin,
    ),
    Claim(
        "p",
        "Open: does starting from other weights (--init) change the order?",
        "Where both start from the same weights, the advised loss is above SupCon. If it is not, "
        "the order has changed.",
        "SupCon and the advised loss at 99-1 with --init",
        2,
        rules.judge_init,
    ),
    Claim(
        "q",
        "Open: does the paper's own probe (SGD, 50 epochs, balanced 1 % of the rows) show the "
        "repair?",
        "By that probe, at the rarest ratio, the advised loss is above SupCon. Also measured: "
        "SupCon over the untrained network by it, and logistic regression on the same rows.",
        "linear_probe.py --protocol reference --optimizer sgd --epochs 50 --rows one-percent",
        0,
        rules.judge_paper_probe,
        rules.measure_paper_probe,
    ),
    Claim(
        "r",
        "Open: does CAC tell the final order earlier in training than kNN accuracy does?",
        "Per seed of SupCon and the advised loss at the rarest ratio: the first validation from "
        "which the order by the number stays that of the final probe. That of CAC is before that "
        "of kNN accuracy. Also measured: SAA against kNN accuracy, CAC against the loss.",
        "SupCon and both losses at 99-1 with --watch-every 1",
        3,
        rules.judge_settling,
        rules.measure_settling,
    ),
)


@dataclass
class Judgement:
    """The decided cases of a claim over all regimes that may judge."""

    claim: Claim
    primary: list = field(default_factory=list)
    others: list = field(default_factory=list)

    @property
    def verdict(self):
        return verdict(self.primary)


def judge_claims(rows):
    """Return (regimes, judgements): all Regimes of the rows, and a Judgement of every claim."""
    regimes = find_regimes(rows)
    judging = list(filter(may_judge, regimes))
    return regimes, [judge(claim, judging) for claim in CLAIMS]


def judge(claim, regimes):
    """Judge a claim by regimes that may.

    A data set with several regimes has its primary case in that of the largest images, then of the
    most steps. In the others the case is also measured.
    """
    found = Judgement(claim)
    if claim.primary is rules.judge_overhead:
        # The benchmark belongs to no regime.
        regimes, found.primary = (), [case for case in [rules.judge_overhead()] if case]
    datasets = set()
    for regime in sorted(regimes, key=lambda r: (r.dataset, -r.size, -r.steps)):
        if case := claim.primary(regime):
            (found.others if regime.dataset in datasets else found.primary).append(case)
            datasets.add(regime.dataset)
        found.others += [case for case in claim.others(regime) if case]
    decide(found.primary, is_corrected=True)
    decide(found.others, is_corrected=False)
    return found
