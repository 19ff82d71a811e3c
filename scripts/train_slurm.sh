#!/usr/bin/env bash
# Train on several nodes of a SLURM cluster; the published recipe has 4 nodes of 8 GPUs:
#
#   sbatch scripts/train_slurm.sh OUT --preset large --data_path DIR --use_cached --cached_path CACHE --save_every_steps 500
#
# OUT must be on a disk that all nodes share. Adapt the lines below to your cluster. Three kinds of ends are handled:
#   a process dies           torchrun restarts all processes, on all nodes, up to RESTARTS times; they continue from the last checkpoint
#   time limit, preemption   SLURM sends USR1 five minutes before; the processes write a checkpoint and end; the job puts itself in the queue again
#   a node dies              SLURM requeues the job (--requeue)
#
#   RESTARTS  default: 3     PORT  default: 29500     PYTHON  default: python
#SBATCH --job-name=tokenbridge
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -euo pipefail

if [ $# -lt 1 ] || [[ $1 == -* ]]; then
    echo "error: usage: sbatch $0 OUT [flags of main_tokenbridge.py]" >&2
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:?run this with sbatch, from the root of the repository}"
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export RENDEZVOUS="$head_node:${PORT:-29500}" NODES=$SLURM_JOB_NUM_NODES JOB=$SLURM_JOB_ID

# torchrun would start a command that is refused RESTARTS times
"${PYTHON:-python}" -c 'import sys, main_tokenbridge as m, util.cli; sys.exit(util.cli.run_cli(lambda: m.main(work=m.read_flags)))' \
    --output_dir "$1" --resume "$1" "${@:2}" || exit 2

srun --kill-on-bad-exit=1 bash scripts/slurm_node.sh "$@" &
step=$!
told=no
# SLURM tells this shell only (B:); it hands the signal to the shells that slurm_node.sh runs in
trap 'told=yes; scancel --signal=USR1 "$SLURM_JOB_ID"' TERM USR1
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do
    status=0
    wait "$step" || status=$?
done
if [ "$told" = yes ] && [ "$status" = 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
