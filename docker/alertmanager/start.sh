#!/bin/sh
# Alertmanager reads no environment: its configuration is put together here, in memory.
set -eu
umask 077
cd "$(dirname "$0")"
cp alertmanager.yml /tmp/alertmanager.yml
if [ -n "${ALERTMANAGER_WEBHOOK_URL:-}" ]; then
    printf '%s' "$ALERTMANAGER_WEBHOOK_URL" >/tmp/webhook_url
    cat webhook.yml >>/tmp/alertmanager.yml
fi
# One instance: no gossip port.
exec /bin/alertmanager --config.file=/tmp/alertmanager.yml --storage.path=/alertmanager --cluster.listen-address= "$@"
