#!/bin/sh
# Keeps nginx's list of the service's replicas. nginx reads names once, when it starts; replicas come, go, and get
# other addresses.
#
#   start        write the first list, and watch from now on (called by the image's entrypoint)
#   list         print the addresses that get requests
#   update       look for replicas now
#   begin, end   around several changes: from `begin` on, answers close their connections, see `reload`
#   drain IP     give a replica no new requests, and return when it has answered those it has (or after DRAIN_SECONDS)
#   undrain IP   it has ended: the next replica may get its address
#
# A replica gets requests once it has answered /readyz; from then on nginx itself sees whether it answers. While none is
# ready (no model is deployed yet), all get them, and say so.
set -eu
STATE=/tmp/upstream
PORT=4242
WATCH_SECONDS=3
KEEPALIVE_SECONDS=16 # One more than keepalive_timeout in nginx.conf.
DRAIN_SECONDS=${DRAIN_SECONDS:-60}
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
        elif curl -fs -o /dev/null --max-time 2 "http://$address:$PORT/readyz"; then
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

write() { # Lists that nginx includes; a closed socket where there is no replica, as a list may not be empty.
    printf '%s\n' "$1" | sed '/^$/d' >"$STATE/current"
    {
        echo 'upstream service {'
        echo '    zone service 64k;'
        echo '    least_conn;'
        if [ -s "$STATE/current" ]; then
            while read -r address; do echo "    server $address:$PORT max_fails=2 fail_timeout=3s;"; done <"$STATE/current"
        else
            echo '    server unix:/tmp/upstream/no-replica.sock;'
        fi
        echo '}'
    } >"$STATE/service.conf.new"
    mv "$STATE/service.conf.new" "$STATE/service.conf"
}

update() {
    addresses=$(wanted)
    [ "$addresses" != "$(cat "$STATE/current")" ] || return 0
    if [ -e "$STATE/closing" ]; then
        write "$addresses"
        reload
    else
        begin
        # Replicas may have come or gone meanwhile.
        write "$(wanted)"
        reload
        end
    fi
}

reload() { # A reload cuts idle connections; after `begin` there are none.
    nginx -t -q && nginx -s reload
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
    update
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

watch() {
    while sleep "$WATCH_SECONDS"; do
        date +%s >"$STATE/watched"
        (flock 9; forget; update) 9>"$STATE/lock" || true
    done
}

case ${1:-} in
    start)
        rm -f "$STATE/closing" "$STATE/none_ready"
        : >"$STATE/drained"
        : >"$STATE/current"
        # The service refuses what is too large with advice; this is a little above its limits.
        echo "client_max_body_size $((STACK_MAX_UPLOAD_BYTES + 65536));" >/etc/nginx/conf.d/body_limit.inc
        echo "client_max_body_size $((STACK_MAX_UPLOAD_BYTES * 8 + 1048576));" >/etc/nginx/conf.d/batch_limit.inc
        write "$(wanted)"
        date +%s >"$STATE/watched"
        watch &
        ;;
    list) cat "$STATE/current" ;;
    update) (flock 9; forget; update) 9>"$STATE/lock" ;;
    begin) (flock 9; begin) 9>"$STATE/lock" ;;
    end) end ;;
    drain) (flock 9; drain "$2") 9>"$STATE/lock" ;;
    healthy) # nginx answers, and its list is being kept.
        curl -fs -o /dev/null --max-time 3 http://127.0.0.1:8081/health
        [ $(($(date +%s) - $(cat "$STATE/watched"))) -lt 180 ]
        ;;
    undrain) (flock 9; sed -i "/^$2$/d" "$STATE/drained"; update) 9>"$STATE/lock" ;;
    *) sed -n '2,14p' "$0"; exit 2 ;;
esac
