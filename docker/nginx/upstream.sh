#!/bin/sh
# Keeps nginx's list of the service's replicas. nginx reads names once, when it starts; replicas come, go, and get
# other addresses.
#
#   start        write the first list, and watch from now on (called by the image's entrypoint)
#   list         print the addresses that get requests
#   update       look for replicas now; fails, and leaves the list as it was, when nginx refuses its configuration
#   begin, end   around several changes: from `begin` on, answers close their connections, see `reload`; without `end`,
#                until CLOSING_MINUTES after the latest `update`
#   drain IP     give a replica no new requests, and return when it has answered those it has (or after DRAIN_SECONDS)
#   undrain IP   it has ended: the next replica may get its address
#   limits DIR   write what follows from the service's limits (called by start)
#   renew        read certificate, key and nginx.conf anew, without a failed request
#
# A replica gets requests once it has answered /readyz; from then on nginx itself sees whether it answers. While none is
# ready (no model is deployed yet), all get them, and say so.
set -eu
STATE=${STATE:-/tmp/upstream}
PORT=4242
WATCH_SECONDS=3
KEEPALIVE_SECONDS=16 # One more than keepalive_timeout in nginx.conf.
DRAIN_SECONDS=${DRAIN_SECONDS:-60}
CLOSING_MINUTES=15
mkdir -p "$STATE"
touch "$STATE/current" "$STATE/drained"

running() { getent ahostsv4 service | awk '{print $1}' | sort -u || true; }

wanted() {
    kept='' new='' waiting=''
    for address in $(running); do
        if grep -qxF "$address" "$STATE/drained"; then
            continue
        elif grep -qxF "$address" "$STATE/current" && [ ! -e "$STATE/none_ready" ]; then
            kept="$kept $address"
        elif curl -fs --noproxy '*' -o /dev/null --max-time 2 "http://$address:$PORT/readyz"; then
            new="$new $address"
        else
            waiting="$waiting $address"
        fi
    done
    if [ -n "$kept$new" ]; then
        rm -f "$STATE/none_ready"
        printf '%s\n' $kept $new | sort
    elif [ -n "$waiting" ]; then
        touch "$STATE/none_ready"
        printf '%s\n' $waiting | sort
    fi
}

write() { # What nginx includes; a closed socket where there is no replica, as a list may not be empty.
    {
        echo 'upstream service {'
        echo '    zone service 64k;'
        echo '    least_conn;'
        for address in $1; do echo "    server $address:$PORT max_fails=2 fail_timeout=3s;"; done
        [ -n "$1" ] || echo '    server unix:/tmp/upstream/no-replica.sock;'
        echo '}'
    } >"$STATE/service.conf.new"
    mv "$STATE/service.conf.new" "$STATE/service.conf"
}

record() { printf '%s\n' "$1" | sed '/^$/d' >"$STATE/current"; }

apply() { # `current` is what nginx has: it changes only when nginx has taken the list.
    write "$1"
    if reload; then
        record "$1"
    else
        write "$(cat "$STATE/current")"
        return 1
    fi
}

update() {
    addresses=$(wanted)
    [ "$addresses" != "$(cat "$STATE/current")" ] || return 0
    nginx -t -q || return 1 # Before anything else: it says what is wrong.
    if [ -e "$STATE/closing" ]; then
        apply "$addresses"
    else
        # Replicas may have come or gone until answers close their connections.
        closing apply_wanted
    fi
}

apply_wanted() { apply "$(wanted)"; }

closing() { # Between `begin` and `end`: `end` whatever becomes of it.
    status=0
    begin
    "$@" || status=$?
    end
    return "$status"
}

reload() { # A reload cuts idle connections; after `begin` there are none.
    nginx -t -q && nginx -s reload || return 1
    sleep 1
}

begin() { touch "$STATE/closing"; sleep "$KEEPALIVE_SECONDS"; }
end() { rm -f "$STATE/closing"; }

requests_at() { # How many connections there are to a replica: /proc/net/tcp has addresses as hexadecimal numbers.
    hex=$(echo "$1" | awk -F. -v port="$PORT" '{printf "%02X%02X%02X%02X:%04X", $4, $3, $2, $1, port}')
    awk -v to="$hex" '$3 == to && $4 == "01" {n++} END {print n + 0}' /proc/net/tcp
}

drain() {
    echo "$1" >>"$STATE/drained"
    if ! update; then
        sed -i "/^$1$/d" "$STATE/drained" # It still gets requests.
        return 1
    fi
    waited=0
    while [ "$(requests_at "$1")" -gt 0 ] && [ "$waited" -lt "$DRAIN_SECONDS" ]; do
        sleep 1
        waited=$((waited + 1))
    done
    echo "$(requests_at "$1") requests in flight after $waited s"
}

forget() { # Addresses of replicas that are gone: the next replica may get one of them.
    for address in $(cat "$STATE/drained"); do
        running | grep -qxF "$address" || sed -i "/^$address$/d" "$STATE/drained"
    done
}

limits() { # The service refuses with advice what is too large or too slow; these are a little above its limits.
    echo "client_max_body_size $((STACK_MAX_UPLOAD_BYTES + 65536));" >"$1/body_limit.inc"
    echo "client_max_body_size $((STACK_MAX_UPLOAD_BYTES * 8 + 1048576));" >"$1/batch_limit.inc"
    # By awk: it may be a fraction of a second. An upload, two predictions for a batch, the log; or an update of the model.
    awk -v predict="$STACK_PREDICT_TIMEOUT_SECONDS" 'BEGIN {
        seconds = 60 + 2 * predict
        if (seconds < 140) seconds = 140
        printf "proxy_read_timeout %ds;\n", seconds + 10
    }' >"$1/read_timeout.inc"
}

watch() {
    while sleep "$WATCH_SECONDS"; do
        date +%s >"$STATE/watched"
        # Who was to call `end` may have been killed.
        find "$STATE" -name closing -mmin "+$CLOSING_MINUTES" -exec rm -f {} + || true
        (flock 9; forget; update) 9>"$STATE/lock" || true
    done
}

case ${1:-} in
    start)
        rm -f "$STATE/closing" "$STATE/none_ready"
        : >"$STATE/drained"
        : >"$STATE/current"
        limits /etc/nginx/conf.d
        addresses=$(wanted)
        write "$addresses"
        record "$addresses"
        date +%s >"$STATE/watched"
        watch &
        ;;
    limits) limits "$2" ;;
    list) cat "$STATE/current" ;;
    update)
        [ ! -e "$STATE/closing" ] || touch "$STATE/closing"
        (flock 9; forget; update) 9>"$STATE/lock"
        ;;
    begin) (flock 9; begin) 9>"$STATE/lock" ;;
    end) end ;;
    drain) (flock 9; drain "$2") 9>"$STATE/lock" ;;
    healthy) # nginx answers, and its list is being kept.
        curl -fs --noproxy '*' -o /dev/null --max-time 3 http://127.0.0.1:8081/health
        [ $(($(date +%s) - $(cat "$STATE/watched"))) -lt 180 ]
        ;;
    renew)
        nginx -t -q # Before anything else: it says what is wrong.
        (flock 9; closing reload) 9>"$STATE/lock"
        ;;
    undrain) (flock 9; sed -i "/^$2$/d" "$STATE/drained"; update) 9>"$STATE/lock" ;;
    *) sed -n '2,17p' "$0"; exit 2 ;;
esac
