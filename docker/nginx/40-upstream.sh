#!/bin/sh
exec /etc/nginx/stack/upstream.sh start
