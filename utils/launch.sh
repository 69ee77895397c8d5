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

launch() {  # run the commands on stdin, one training at a time on each of the devices "$@"
    local slots=(-P $# --process-slot-var=SLOT)
    xargs "${slots[@]}" true < /dev/null 2> /dev/null || slots=()  # macOS: one at a time
    local -x DEVICES="$*"
    [ $# = 1 ] || local -x OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((CORES > $# ? CORES / $# : 1))}"
    export -f train run_part
    echo "training on: $DEVICES"
    guard run_commands < <(tr '\n' '\0') ||
        { echo "some runs failed; the same command tries them again" >&2; return 1; }
}

# shellcheck disable=SC2016  # the inner shells expand $0, a command
run_commands() {
    local each=(xargs -0 -n 1 ${slots[@]+"${slots[@]}"} bash -c)
    if [[ $DEVICES == *cpu* ]]; then  # a probe beside a training would only share its cores
        "${each[@]}" 'run_part "$0" "$0"'
    else  # what follows the training of a run goes on beside the training of the next
        { "${each[@]}" 'train "$0"' 3>&1 >&4 |
            nice "${each[@]}" 'run_part "$0" "${0#* && }"'; } 4>&1
    fi
}

train() {  # run the first part of command $1, then hand the command on if it has further parts
    run_part "$1" "${1%% && *}" 3>&- && if [[ $1 == *" && "* ]]; then printf '%s\0' "$1" >&3; fi
}

run_part() {  # run part $2 of command $1 on the device of this slot, and label its lines
    set -o pipefail
    local devices name=${1#*--out } line
    read -ra devices <<< "$DEVICES"
    [ "${devices[SLOT]}" = cpu ] || export CUDA_VISIBLE_DEVICES=${devices[SLOT]}
    echo "$2"
    if [ "$DEVICES" = cpu ]; then
        bash -c "$2"
    else  # a signal ends the command; the loop prints what the command says about it
        bash -c "$2" 2>&1 | (trap '' TERM
            while IFS= read -r line; do printf '%s: %s\n' "${name%% *}" "$line"; done)
    fi || { echo "failed: $2" >&2; return 1; }
}

guard() {  # run a command in its own process group, to which signals are passed on
    set -m; "$@" & group=$!; set +m
    # shellcheck disable=SC2064  # the loop variable is meant now
    for signal in INT TERM HUP USR1; do trap "stop $signal" "$signal"; done
    wait "$group"
}

stop() {  # start no further run, end the others, give them 30 s
    trap - INT TERM HUP USR1
    echo "stopped by SIG$1; the same command continues" >&2
    kill -s TERM -- "-$group" 2> /dev/null || true  # at USR1 xargs starts one more
    for _ in {1..300}; do kill -s 0 -- "-$group" 2> /dev/null || break; sleep 0.1; done
    exit $((128 + $(kill -l "$1")))
}
