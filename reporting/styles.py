"""One look for each method, the same in every figure. Needs no torch.

Colours keep a contrast of 3 against white and against the dark theme of the HTML report. The first
four are told apart by colour-blind readers (Okabe and Ito, 2008); the others were chosen as far
apart as that contrast permits. Markers and lines tell all methods apart in grey.
"""

from typing import NamedTuple


class Style(NamedTuple):
    name: str  # in full
    colour: str
    marker: str
    line: str | tuple = "-"  # a line style of matplotlib


DASHES, DOTS, DASH_DOT, LONG = "--", ":", "-.", (0, (7, 2))
# In the order of the tables.
METHOD_STYLES = {
    "raw pixels": Style("raw pixels", "#7F7F7F", "+", DOTS),
    "untrained": Style("untrained", "#7F7F7F", "x", DOTS),
    "ntxent": Style("NT-Xent", "#0072B2", "o"),
    "supcon": Style("SupCon", "#D55E00", "X", DASHES),
    "supmin": Style("Supervised Minority", "#009E73", "^", DASH_DOT),
    "suppro": Style("Supervised Prototypes", "#C4589A", "s", LONG),
    "kcl": Style("KCL", "#4B693C", "D", DOTS),
    "tsc": Style("TSC", "#5AA52D", "v"),
    "sbcl": Style("SBC", "#3C6978", "P", DASHES),
    "bcl": Style("BCL", "#B487C3", "*", DASH_DOT),
    "paco": Style("PaCo", "#872DD2", "<", LONG),
    "ce": Style("cross entropy", "#8778FF", ">", DOTS),
    "weighted_ce": Style("weighted CE", "#780FFF", "p"),
    "focal": Style("focal loss", "#D200B4", "h", DASHES),
    "ldam_drw": Style("LDAM-DRW", "#C30F0F", "8", DASH_DOT),
    "logit_adjusted": Style("logit adjustment", "#F06978", "d", LONG),
    "crt": Style("cRT", "#E1004B", "H", DOTS),
    "tau_norm": Style("tau-normalisation", "#D269E1", "1"),
    "lws": Style("LWS", "#FF00FF", "2", DASHES),
}
