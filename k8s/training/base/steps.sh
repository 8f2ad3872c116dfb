#!/bin/sh
# From text to a published archive, in steps of `python -m training`; what is done already is not done
# again, so a pod that takes another's place goes on where that one was.
#
#   RECIPE       a recipe of the image, or a mounted file
#   RUN          folder of the run, on a volume that outlives the pod
#   DATA         folder of the text, instead of the recipe's own; may be empty
#   OPTIONS      more for every verb, such as --set training.seed=2; may be empty
#   TRAIN        more for the verb train alone: --accept-changes, after another NODES; may be empty
#   PUBLISH      folder for seq2seq-<sha256>.mar
#   PUBLISH_URI  what that folder is called from outside (gs://BUCKET/models); may be empty
#   REQUIRE_GPU  true: refuse to train on a CPU
#   NODES        how many pods learn together; above 1, with RENDEZVOUS=HOST:PORT and
#                JOB_COMPLETION_INDEX, which Kubernetes gives each pod of an Indexed Job
#
# Exit status: 0 done; 1 and 2 something that another try would not change (it says what); 130 or 143
# stopped, and goes on when it is started again.
set -eu
NODES=${NODES:-1} INDEX=${JOB_COMPLETION_INDEX:-0} DATA=${DATA:-} OPTIONS=${OPTIONS:-} TRAIN=${TRAIN:-}
child='' stopped=''

# Process 1 of a container gets SIGTERM; the step that runs shall have it, and time to save.
forward() { stopped=yes; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true; }
trap forward TERM INT

step() {
  [ -z "$stopped" ] || exit 143
  echo "steps: $*"
  "$@" &
  child=$!
  # A signal ends `wait`, not the step.
  while :; do
    status=0; wait "$child" || status=$?
    kill -0 "$child" 2>/dev/null || break
  done
  child=''
  [ "$status" -eq 0 ] || exit "$status"
}

# DATA, OPTIONS and TRAIN may be empty; the latter two are words.
# shellcheck disable=SC2086
verb() {
  name=$1; shift
  step python -m training "$name" "$RECIPE" --run "$RUN" ${DATA:+--data "$DATA"} $OPTIONS "$@"
}

# shellcheck disable=SC2086
learn() {
  if [ "$NODES" -eq 1 ]; then verb train $TRAIN; return; fi
  # A pod that is lost ends the others' collective calls: torchrun starts them again, up to
  # max-restarts times, when the new pod has come, and all go on from the last checkpoint.
  # `--`, or it takes our --run for the beginning of its own --run-path.
  if [ "$INDEX" -eq 0 ]; then host=true; else host=false; fi
  step torchrun --nnodes "$NODES" --nproc-per-node 1 --max-restarts 10 --rdzv-backend c10d \
    --rdzv-endpoint "$RENDEZVOUS" --rdzv-conf "is_host=$host" --rdzv-id "$RUN" \
    -m -- training train "$RECIPE" --run "$RUN" ${DATA:+--data "$DATA"} $OPTIONS $TRAIN
}

publish() {
  digest=$(cut -c1-64 "$RUN/archive/seq2seq.mar.sha256")
  name=seq2seq-$digest.mar
  mkdir -p "$PUBLISH"
  if [ ! -f "$PUBLISH/$name" ]; then
    cp "$RUN/archive/seq2seq.mar" "$PUBLISH/.$name.part"
    mv "$PUBLISH/.$name.part" "$PUBLISH/$name"
  fi
  echo "$digest  $name" > "$PUBLISH/$name.sha256"
  (cd "$PUBLISH" && sha256sum -c "$name.sha256")
  echo "steps: for environment.yaml of a serving overlay:"
  echo "  model-sha256: \"$digest\""
  echo "  model-uri: ${PUBLISH_URI:-$PUBLISH}/$name"
}

if [ "${REQUIRE_GPU:-}" = true ]; then
  step python -c 'import sys, torch
sys.exit(None if torch.cuda.is_available() else "steps: REQUIRE_GPU is true, but torch sees no GPU: "
         "is the image the CUDA build, and does the node have a driver?")'
fi
if [ "$INDEX" -gt 0 ]; then
  # The first pod prepares; all read what it wrote, on the shared volume.
  until [ -f "$RUN/data/report.json" ]; do step sleep "${POLL:-5}"; done
  [ -f "$RUN/training.json" ] || learn
  exit 0
fi
# Each verb writes the file named here last.
[ -f "$RUN/data/report.json" ] || verb prepare
[ -f "$RUN/training.json" ] || learn
[ -f "$RUN/scores.json" ] || verb evaluate
[ -f "$RUN/model.pt" ] || verb export
verb archive --store "$RUN/archive"
publish
