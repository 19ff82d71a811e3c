#!/usr/bin/env bash
# One node's part of train_slurm.sh, started there by srun: torchrun, which meets those of the other nodes at RENDEZVOUS.
# USR1 is for the training processes; torchrun, which would end with it, ignores it.
set -euo pipefail
out=$1
shift
python=${PYTHON:-python}
processes=${PROCESSES:-$("$python" -c 'from util.dist import device_count; print(max(1, device_count()))')}

(
    trap '' USR1
    exec "$python" -m torch.distributed.run --nnodes="$NODES" --nproc_per_node="$processes" --max_restarts="${RESTARTS:-3}" \
        --rdzv_backend=c10d --rdzv_endpoint="$RENDEZVOUS" --rdzv_id="$JOB" \
        main_tokenbridge.py --output_dir "$out" --resume "$out" "$@"
) &
launcher=$!
trap 'pkill -USR1 -P "$launcher" || true' TERM USR1
status=0
wait "$launcher" || status=$?
while kill -0 "$launcher" 2>/dev/null; do
    status=0
    wait "$launcher" || status=$?
done
exit "$status"
