# Functions shared by the scripts in this folder; not meant to be executed.
# shellcheck shell=bash

# Prints an error and exits with the status for bad input.
fail() {
  echo "error: $*" >&2
  exit 2
}

# Removes --dry-run from the arguments and leaves the rest in ARGUMENTS.
parse() {
  DRY_RUN=${DRY_RUN:-}
  ARGUMENTS=()
  local argument
  for argument in "$@"; do
    if [[ $argument == --dry-run ]]; then DRY_RUN=1; else ARGUMENTS+=("$argument"); fi
  done
}

# The secret with which the processes of a job authenticate each other (rendezvous.py); other users cannot read the
# environment.
share_secret() {
  export VPAE_SECRET=${VPAE_SECRET:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}
}

# Runs a command; a dry run prints it instead, quoted for pasting.
run() {
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# Runs a command in the background and forwards SIGTERM to it; returns its status, and sets STOPPED on SIGTERM.
run_and_forward() {
  STOPPED=
  local status
  "$@" &
  local child=$!
  trap 'STOPPED=1; kill -TERM "$child" 2>/dev/null' TERM INT
  while true; do
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2>/dev/null || break  # a signal ends `wait`, not the command
  done
  trap - TERM INT
  return "$status"
}

# Retries a command when it fails, up to RETRIES times (5), after BACKOFF seconds (10), doubled each time up to five
# minutes. Bad input (status 2) fails at once, and nothing is retried after SIGTERM.
retry() {
  local retries=${RETRIES:-5} pause=${BACKOFF:-10} attempt=0 status
  while true; do
    status=0
    run_and_forward "$@" || status=$?
    if ((status == 0 || status == 2)) || [[ -n $STOPPED ]]; then return "$status"; fi
    if ((attempt++ >= retries)); then
      echo "error: failed $attempt times, with status $status at last; not tried again" >&2
      return "$status"
    fi
    echo "status $status; starting again in $pause s ($attempt of $retries)" >&2
    run_and_forward sleep "$pause" || return "$status"
    pause=$((pause * 2 < 300 ? pause * 2 : 300))
  done
}
