#!/usr/bin/env bash
# Train on one machine, one process per GPU (or PROCESSES of them):
#
#   scripts/train_node.sh OUT --preset large --data_path DIR [any other flag]
#
# The same command continues a run that ended: OUT is --output_dir and --resume. When a process dies, torchrun starts all of them again, up to
# RESTARTS times, and they continue from the last checkpoint; have one every few minutes with --save_every_steps. Ctrl-C, SIGTERM or
# SIGUSR1 to this script reaches the processes: they finish their step, write a checkpoint and end with exit code 0. Flags that are refused
# end it with exit code 2, before anything is started.
#
#   PROCESSES  default: one per GPU, 1 without GPUs     RESTARTS  default: 3     PYTHON  default: python
set -euo pipefail

if [ $# -lt 1 ] || [[ $1 == -* ]]; then
    echo "error: usage: $0 OUT [flags of main_tokenbridge.py]" >&2
    exit 2
fi
out=$1
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) # paths are relative to where this is started
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python}
processes=${PROCESSES:-$("$python" -c 'from util.dist import device_count; print(max(1, device_count()))')}

# torchrun would start a command that is refused RESTARTS times
WORLD_SIZE=$processes "$python" -c 'import sys, main_tokenbridge as m, util.cli; sys.exit(util.cli.run_cli(lambda: m.main(work=m.read_flags)))' \
    --output_dir "$out" --resume "$out" "$@" || exit 2

# torchrun would end with its first signal, its processes half a minute later: it ignores USR1, which they are sent themselves
(
    trap '' USR1
    exec "$python" -m torch.distributed.run --standalone --nproc_per_node="$processes" --max_restarts="${RESTARTS:-3}" \
        "$root/main_tokenbridge.py" --output_dir "$out" --resume "$out" "$@"
) &
launcher=$!
trap 'pkill -USR1 -P "$launcher" || true' INT TERM USR1
status=0
wait "$launcher" || status=$?
while kill -0 "$launcher" 2>/dev/null; do          # a signal ended the first wait, not the launcher
    status=0
    wait "$launcher" || status=$?
done
exit "$status"
