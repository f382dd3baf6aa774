#!/usr/bin/env bash
# A TPU VM pod, from nothing to a run: every worker installs the project and starts the same command.
# The same script once more goes on from the last step. docs/pods.md says what each part is for.
set -euo pipefail

TPU=${TPU:-deepseek}                      # name of the pod
ZONE=${ZONE:-us-east5-a}
KIND=${KIND:-v5p-128}                     # accelerator type; v5p counts cores, v5e and v6e count chips
RUNTIME=${RUNTIME:-v2-alpha-tpuv5}        # v2-alpha-tpuv5-lite for v5e, v2-alpha-tpuv6e for v6e
SOURCE=${SOURCE:?git address of this project}
BUCKET=${BUCKET:?a bucket in the region of the pod, such as gs://my-runs}

on_all() { gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "$1"; }

gcloud compute tpus tpu-vm describe "$TPU" --zone "$ZONE" >/dev/null 2>&1 ||
  gcloud compute tpus tpu-vm create "$TPU" --zone "$ZONE" --accelerator-type "$KIND" --version "$RUNTIME"

on_all "test -d deepseek_jax || git clone $SOURCE deepseek_jax
  cd deepseek_jax && python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu,gcs]'"

# A screen of every worker would end with the ssh session; nohup and a log stay. Nothing of the run may hold ssh's own
# streams, or ssh waits for its end.
on_all "cd deepseek_jax && { nohup .venv/bin/deepseek-jax train configs/deepseek_v2_lite.py --hosts auto \
  --run-dir $BUCKET/v2_lite --data.cache-dir $BUCKET/cache \
  --data.sources.0.path $BUCKET/corpus --data.tokenizer $BUCKET/tokenizer.json \
  --accumulation 18 --model.remat v3 --mesh.data 1 --mesh.fsdp -1 > run.log 2>&1 < /dev/null & }"

on_all "tail -n 5 deepseek_jax/run.log"
