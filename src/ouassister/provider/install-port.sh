#!/bin/sh
# Install OUassister's helper in this machine: run as root, in the folder with its files.
set -e
cd "$(dirname "$0")"
install -D -m 755 ouassister-port /usr/local/sbin/ouassister-port
install -D -m 644 ouassister-port.service /etc/systemd/system/ouassister-port.service
systemctl daemon-reload
systemctl enable ouassister-port.service
if [ -e /dev/virtio-ports/org.ouassister.0 ]; then
    systemctl restart ouassister-port.service
else
    echo "this machine has no port org.ouassister.0 yet; the helper starts once it has" >&2
fi
