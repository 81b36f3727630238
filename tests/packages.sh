#!/usr/bin/env bash
# System packages of tests that make hosts (network namespaces with an sshd) and a Slurm: Debian and Ubuntu, as root.
# No service is started. Where they are missing, those tests are skipped and say so.
set -euo pipefail
have() { command -v "$1" >/dev/null || [ -x "/usr/sbin/$1" ]; }
missing=()
for pair in sshd:openssh-server ssh:openssh-client ip:iproute2 unshare:util-linux slurmctld:slurm-wlm munged:munge; do
  have "${pair%%:*}" || missing+=("${pair##*:}")
done
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" != 0 ] || ! have apt-get; then
  echo "tests of hosts and Slurm will be skipped: ${missing[*]} not installed" >&2
  exit 0
fi
# Packages ask this file whether they may start what they install.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
  printf '#!/bin/sh\nexit 101\n' > $policy && chmod +x $policy
  trap 'rm -f $policy' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
{ apt-get update && apt-get install -y --no-install-recommends "${missing[@]}"; } > /dev/null ||
  echo "tests of hosts and Slurm will be skipped: ${missing[*]} could not be installed" >&2
