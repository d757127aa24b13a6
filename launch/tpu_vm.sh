#!/usr/bin/env bash
# Trains on a Cloud TPU slice and goes on after each preemption.
#
#   launch/tpu_vm.sh            ask for the slice, install, train, wait
#   launch/tpu_vm.sh delete     give the slice back
#
# Run it from the repository, on any machine that has gcloud. It may be stopped
# and started at any time: training goes on without it.
set -euo pipefail

# What to edit.
NAME=kdjax
ZONE=us-east5-b
TYPE=v6e-16                  # 4 machines of 4 chips
RUNTIME=v2-alpha-tpuv6e
DISK=10.0.0.2:/runs          # a Filestore share, seen by all machines as /runs;
                             # empty where WORKDIR is in a bucket
WORKDIR=/runs/cifar100       # or gs://BUCKET/cifar100
TRAIN=(python -m kdjax.train --config=configs/cifar100/pair.py
  "--workdir=$WORKDIR")

tpu() { gcloud compute tpus "$@" --zone="$ZONE"; }

on() { # WORKER COMMAND
  tpu tpu-vm ssh "$NAME" --worker="$1" --command="$2"
}

# WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, SUSPENDED, FAILED, ...; NONE where
# there is no such resource, UNKNOWN where gcloud could not say.
state() {
  if tpu queued-resources describe "$NAME" --format='value(state.state)' \
    2> "$TEMP/said"; then
    return
  elif grep -q NOT_FOUND "$TEMP/said"; then
    echo NONE
  else
    cat "$TEMP/said" >&2
    echo UNKNOWN
  fi
}

create() {
  tpu queued-resources create "$NAME" --node-id="$NAME" --spot \
    --accelerator-type="$TYPE" --runtime-version="$RUNTIME"
}

delete() {
  tpu queued-resources delete "$NAME" --force --quiet
}

# One command, so that the first step that fails ends it.
install() {
  git archive --format=tar.gz --output="$TEMP/kdjax.tar.gz" HEAD &&
    tpu tpu-vm scp "$TEMP/kdjax.tar.gz" "$NAME:kdjax.tar.gz" --worker=all &&
    # The image's Python is older than 3.11.
    on all "set -e
    flock --nonblock lock true || exit 0 # training is under way
    if [ -n '$DISK' ]; then
      sudo apt-get install -qq -y nfs-common
      sudo mkdir -p /runs
      mountpoint -q /runs || sudo mount -t nfs $DISK /runs
      sudo chmod go+rwx /runs
    fi
    sudo sh -c 'echo always > /sys/kernel/mm/transparent_hugepage/enabled'
    mkdir -p kdjax && tar -xzf kdjax.tar.gz -C kdjax
    python3 -m pip install --quiet --user uv
    test -d venv || ~/.local/bin/uv venv --quiet --python 3.12 venv
    ~/.local/bin/uv pip install --quiet --python venv/bin/python './kdjax[tpu,gcs]'"
}

# Detached, so that it outlives this connection. Of a run that was lost, machines
# may take --lost_seconds to end: the lock is waited for as long, and longer. A
# second start of one that goes on waits in vain and does nothing.
start() {
  local command
  command=$(printf '%q ' "${TRAIN[@]}")
  on all "cd kdjax && rm -f ../code && PATH=\$HOME/venv/bin:\$PATH \
    nohup setsid flock --wait 120 ../lock bash -c \
    '$command >> ../train.log 2>&1; echo \$? > ../code' > /dev/null 2>&1 &"
}

if [[ ${1:-} == delete ]]; then
  delete
  exit
fi
TEMP=$(mktemp -d)
trap 'rm -rf "$TEMP"' EXIT

finished() {
  if [[ $WORKDIR == gs://* ]]; then
    gcloud storage ls "$WORKDIR/results.json" > /dev/null 2>&1
  else
    on 0 "test -f $WORKDIR/results.json"
  fi
}

running=no
while true; do
  case $(state) in
    NONE)
      running=no
      create
      ;;
    SUSPENDED | FAILED)
      running=no
      delete || true # again in a minute
      ;;
    ACTIVE)
      if [[ $running == no ]]; then
        if install && start; then running=yes; fi
      else
        code=$(on 0 'cat code 2>/dev/null || true') || code=
        case $code in
          '') ;; # still at it, or not reachable just now
          0)
            if ! finished; then # SIGTERM, saved
              start || running=no
              continue
            fi
            echo "done: $WORKDIR/results.json; now: launch/tpu_vm.sh delete"
            exit 0
            ;;
          1 | 2)
            on 0 'tail -n 20 train.log'
            echo "ended with exit code $code, see the lines above" >&2
            exit "$code"
            ;;
          *)
            echo "ended with exit code $code: starting again" >&2
            start || running=no
            ;;
        esac
      fi
      ;;
  esac
  sleep 60
done
