#!/usr/bin/env bash
# restart.sh COMMAND...: runs it again as long as it ends with status 75 ("all is saved, start me
# again"). SIGTERM and SIGINT are passed on; after one of them the status is passed on as well.
set -u
child=
stopped=
pass_on() {
    stopped=1
    [ -z "$child" ] || kill -TERM "$child" 2>/dev/null
}
trap pass_on TERM INT
while :; do
    "$@" &
    child=$!
    wait "$child"
    status=$?
    # A trapped signal interrupts `wait`: the command is still saving.
    while kill -0 "$child" 2>/dev/null; do
        wait "$child"
        status=$?
    done
    if [ "$status" -ne 75 ] || [ -n "$stopped" ]; then
        exit "$status"
    fi
    echo "restart.sh: status 75, starting again" >&2
done
