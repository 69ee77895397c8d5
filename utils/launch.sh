# Sourced by run_all.sh and results/evidence.sh: set up Python, run commands on GPUs or CPU cores.

CORES=$(getconf _NPROCESSORS_ONLN)
export DATA_ROOT=${DATA_ROOT-data}
case $DATA_ROOT in /*) ;; *) DATA_ROOT=$PWD/$DATA_ROOT ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

die() { echo "$(basename "$0"): $1" >&2; exit 2; }

[[ ${JOBS:-1} =~ ^[1-9][0-9]*$ ]] || die "JOBS=$JOBS is not a number from 1 up"

setup() {  # set PYTHON to an interpreter that satisfies the requirements in file $1
    local python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' ||
        die "$python is not Python 3.10 to 3.13; name one with PYTHON=..."
    for PYTHON in "$python" .venv/bin/python; do ! has_requirements "$1" || return 0; done
    "$PYTHON" -m pip --version > /dev/null 2>&1 || "$python" -m venv --clear .venv ||
        die "cannot create .venv; on Debian or Ubuntu: apt install python3-venv"
    "$PYTHON" -m pip install --disable-pip-version-check -r "$1" -c constraints.txt ||
        die "cannot install $1 (see above); run the same command again"
}

has_requirements() {  # nothing to install from: pip succeeds only if all is installed already
    PIP_CONFIG_FILE=/dev/null "$PYTHON" -m pip --isolated install --dry-run --no-index --no-deps \
        -r "$1" > /dev/null 2>&1
}

devices() {  # print the ids of the GPUs; without a GPU print the word cpu, JOBS (or $1) times
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        tr ', ' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -v -x -e "" -e -1
    else
        nvidia-smi -L 2> /dev/null | sed -n 's/^GPU \([0-9]*\):.*/\1/p' | grep .
    fi || printf 'cpu %.0s' $(seq "${JOBS:-$1}")
}

launch() {  # run the commands on stdin, one at a time on each of the devices "$@"
    local slots=(-P $# --process-slot-var=SLOT)
    xargs "${slots[@]}" true < /dev/null 2> /dev/null || slots=()  # macOS: one at a time
    local -x DEVICES="$*"
    [ $# = 1 ] || local -x OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((CORES > $# ? CORES / $# : 1))}"
    export -f run_one
    echo "training on: $DEVICES"
    # shellcheck disable=SC2016  # expanded by the inner shell
    guard xargs -0 -n 1 ${slots[@]+"${slots[@]}"} bash -c 'run_one "$0"' < <(tr '\n' '\0') ||
        { echo "some runs failed; the same command tries them again" >&2; return 1; }
}

run_one() {  # run command $1 on the device of this slot; several at a time: label every line
    set -o pipefail
    local devices name=${1##*--out } line
    read -ra devices <<< "$DEVICES"
    [ "${devices[SLOT]}" = cpu ] || export CUDA_VISIBLE_DEVICES=${devices[SLOT]}
    echo "$1"
    if [ ${#devices[@]} = 1 ]; then
        bash -c "$1"
    else  # a signal ends the command; the loop prints what the command says about it
        bash -c "$1" 2>&1 | (trap '' INT TERM USR1
            while IFS= read -r line; do printf '%s: %s\n' "${name%% *}" "$line"; done)
    fi || { echo "failed: $1" >&2; return 1; }
}

guard() {  # run a command in its own process group, to which signals are passed on
    set -m; "$@" & group=$!; set +m
    # shellcheck disable=SC2064  # the loop variable is meant now
    for signal in INT TERM HUP USR1; do trap "stop $signal" "$signal"; done
    wait "$group"
}

stop() {  # start no further run, pass signal $1 on, give the runs 30 s to end
    trap - INT TERM HUP USR1
    echo "stopped by SIG$1; the same command continues" >&2
    kill -s TERM "$group" 2> /dev/null || true  # xargs
    kill -s "${1/HUP/TERM}" -- "-$group" 2> /dev/null || true
    for _ in {1..300}; do kill -s 0 -- "-$group" 2> /dev/null || break; sleep 0.1; done
    exit $((128 + $(kill -l "$1")))
}
