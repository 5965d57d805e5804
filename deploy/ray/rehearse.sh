#!/usr/bin/env bash
# Rehearses deploy/ray/onpremise.yaml on one Linux machine, without touching it: a laptop, a head and two hospitals, each
# in PID, network and mount namespaces of its own, the nodes with an sshd of their own. Everything that ray up, ray job
# submit and ray down do is done; `ray stop` reaches only the namespace that it runs in. Needs root, iproute2,
# openssh-server, openssh-client, rsync and the project's environment (make install).
#   sudo deploy/ray/rehearse.sh [PYTHON]
# It has been seen to install and to make certificates on the head; it has not yet run to its end.
set -euo pipefail
role=${1:-}
address_of() { case $1 in head) echo 10.77.0.10 ;; north) echo 10.77.0.11 ;; south) echo 10.77.0.12 ;; esac; }

prepare() { # $1 = the project's python: the homes of laptop and nodes, as an administrator would find them
  local python=$1 work=$2 name
  "$python" -c 'import sys; print("\n".join(p for p in sys.path if p.endswith("site-packages")))' >"$work/packages"
  install -d -m 700 "$work/laptop/.ssh"
  ssh-keygen -q -t ed25519 -N '' -f "$work/laptop/.ssh/id_ed25519"
  sed 's#^root:.*#root:x:0:0:root:/home/medfl:/bin/bash#' /etc/passwd >"$work/passwd"
  for name in head north south; do
    install -d -m 755 "$work/$name"
    install -d -m 700 "$work/$name/.ssh"
    install -m 600 "$work/laptop/.ssh/id_ed25519.pub" "$work/$name/.ssh/authorized_keys"
    ssh-keygen -q -t ed25519 -N '' -f "$work/$name/.ssh/host_key"
    # The libraries come from this machine, for a namespace has no way to a package index; the wheel is installed by pip.
    "$python" -m venv "$work/$name/medfl/env"
    "$work/$name/medfl/env/bin/python" -m pip uninstall --quiet --yes setuptools # older than the one among the libraries
    printf '[global]\nno-index = true\n' >"$work/$name/medfl/env/pip.conf"
    cp "$work/packages" "$(echo "$work/$name"/medfl/env/lib/python3*/site-packages)/libraries.pth"
    printf '#!/home/medfl/medfl/env/bin/python\nfrom ray.scripts.scripts import main\nmain()\n' >"$work/$name/medfl/env/bin/ray"
    sed -i '1s#.*#\#!/home/medfl/medfl/env/bin/python#' "$work/$name/medfl/env/bin/ray"
    chmod +x "$work/$name/medfl/env/bin/ray"
  done
  echo north >"$work/north/medfl-hospital"
  echo south >"$work/south/medfl-hospital"
  "$python" -m medfl_ray.cli.main cluster secrets "$work/project/deploy/ray/secrets" >/dev/null
  cp -r dist constraints.txt "$work/project/"
  "$python" - "$work" <<'PYTHON'
import sys
from pathlib import Path

import yaml

work = Path(sys.argv[1])
cluster = yaml.safe_load(Path("deploy/ray/onpremise.yaml").read_text())
cluster["provider"] |= {"head_ip": "10.77.0.10", "worker_ips": ["10.77.0.11", "10.77.0.12"]}
cluster["auth"] = {"ssh_user": "root", "ssh_private_key": str(work / "laptop/.ssh/id_ed25519")}
(work / "project/onpremise.yaml").write_text(yaml.safe_dump(cluster, sort_keys=False))
hospitals = [
    {"id": name, "directory": "/home/medfl/data", "num_patients": 10, "max_epsilon": 100} for name in ("north", "south")
]
job = {
    "name": "rehearsal",
    "data": {"hospitals": hospitals, "labels": {1: "tumour"}, "channels": ["T1"], "name": "heads"},
    "model": {"type": "unet3d", "features": [4, 8]},
    "training": {"learning_rate": 0.01, "patch_size_voxels": 16, "device": "cpu"},
    "federation": {"rounds": 3, "local_steps": 2, "min_clients": 2},
    "privacy": {"enable_dp": True, "epsilon": 30, "max_grad_norm": 0.5, "sample_rate": 0.5},
    "output": {"directory": "/home/medfl/runs", "report": False},
}
(work / "project/job").mkdir()
(work / "project/job/run.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
PYTHON
}

node() { # one machine: loopback, eth0, home, /tmp and /dev/shm of its own, and an sshd
  local work=$1 name=$2
  hostname "$name"
  until ip link show eth0 >/dev/null 2>&1; do sleep 0.1; done
  ip link set lo up
  ip address add "$(address_of "$name")/24" dev eth0
  ip link set eth0 up
  ip route add default via 10.77.0.1
  mount -t tmpfs tmpfs /home && mkdir /home/medfl && mount --bind "$work/$name" /home/medfl
  mount --bind "$work/passwd" /etc/passwd
  mount -t tmpfs tmpfs /tmp && mount -t tmpfs tmpfs /dev/shm && mount -t tmpfs tmpfs /run && mkdir /run/sshd
  exec /usr/sbin/sshd -D -e -f /dev/null -h /home/medfl/.ssh/host_key -o UsePAM=no -o PidFile=none \
    -o ListenAddress="$(address_of "$name")" -o PasswordAuthentication=no -o PermitRootLogin=prohibit-password
}

plain() { sed -E 's/\x1b\[[0-9;]*m//g'; } # without colours
say() { printf '\n=== %s\n' "$*"; }
on() { ssh -q -i ~/.ssh/id_ed25519 -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null "root@$(address_of "$1")" "${@:2}"; }
ray() { "$python" -c 'from ray.scripts.scripts import main; main()' "$@"; }
at_head() { on head ". ~/medfl/node/ray.env; export PATH=~/medfl/env/bin:\$PATH; $*"; }
ray_processes() { # of all namespaces below this one
  local found=0 process
  for process in /proc/[0-9]*; do
    if tr '\0' ' ' <"$process/cmdline" 2>/dev/null |
      grep -qE 'raylet|gcs_server|ray::|/ray/(_private|dashboard|autoscaler|util)/|medfl/env/bin/'; then
      found=$((found + 1))
    fi
  done
  echo "$found"
}

laptop() { # $1 = work folder: what an administrator and a data scientist type
  local work=$1 name
  python=$(<"$work/python")
  export HOME=$work/laptop RAY_USAGE_STATS_ENABLED=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 PYTHONWARNINGS=ignore
  mount -t tmpfs tmpfs /tmp
  ip link set lo up
  ip link add switch type bridge && ip address add 10.77.0.1/24 dev switch && ip link set switch up
  for name in head north south; do
    unshare --net --pid --mount --uts --fork --kill-child --mount-proc bash "$0" node "$work" "$name" 2>"$work/$name.log" &
    ip link add "to-$name" type veth peer name "eth-$name"
    ip link set "to-$name" master switch up
    until [ "$(readlink "/proc/$!/ns/net")" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
    ip link set "eth-$name" netns $! name eth0
    until on "$name" true; do sleep 0.3; done
  done
  cd "$work/project"

  say 'ray up onpremise.yaml'
  ray up -y --no-config-cache onpremise.yaml </dev/null >"$work/up.log" 2>&1 || { tail -n 60 "$work/up.log"; exit 1; }
  plain <"$work/up.log" | grep -oE 'Setting up head node|New status: .*|Ray runtime started'
  say 'each hospital renders its own images (a real one has them)'
  for name in north south; do
    on "$name" "~/medfl/env/bin/medfl-ray data make ~/data --hospitals 1 --patients 12 --size 16 --layout manifest --seed \$RANDOM" | tail -n 2
  done
  say 'ray status, at the head'
  local tries=0
  until at_head ray status 2>/dev/null | grep -q 'hospital:south' && at_head ray status 2>/dev/null | grep -q 'hospital:north'; do
    tries=$((tries + 1))
    [ $tries -lt 90 ] || { at_head 'ray status; tail -n 40 /tmp/ray/session_latest/logs/monitor.*'; exit 1; }
    sleep 2
  done
  at_head ray status 2>/dev/null | sed -n '/^Total Usage/,/^$/p;/^Active/,/^Pending/p'
  say 'without the token, and without a certificate, nobody joins'
  on north "RAY_AUTH_MODE=token RAY_AUTH_TOKEN=0000 timeout 60 ~/medfl/env/bin/python -c \"import ray; ray.init('10.77.0.10:6379')\"" >/dev/null 2>&1 && exit 1
  echo 'refused without a certificate'
  on north ". ~/medfl/node/ray.env; unset RAY_AUTH_TOKEN_PATH; RAY_AUTH_TOKEN=0000 timeout 60 ~/medfl/env/bin/python -c \"import ray; ray.init('10.77.0.10:6379')\"" >/dev/null 2>&1 && exit 1
  echo 'refused without the token'
  say 'what listens on the head beside Ray'"'"'s own ports of the cluster: the dashboard, on loopback'
  at_head ss -Hltn | awk '$4 ~ /:8265$/ { print $4 }'
  say 'ray dashboard onpremise.yaml; ray job submit --working-dir job -- medfl-ray run run.yaml'
  ray dashboard onpremise.yaml >/dev/null 2>&1 </dev/null &
  local tunnel=$!
  until curl -s -o /dev/null http://127.0.0.1:8265; do sleep 0.5; done
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$work/project/deploy/ray/secrets/auth_token
  curl -s -o /dev/null -w 'jobs without the token: HTTP %{http_code}\n' http://127.0.0.1:8265/api/jobs/
  ray job submit --address http://127.0.0.1:8265 --submission-id rehearsal --working-dir job -- medfl-ray run run.yaml 2>&1 |
    grep -vE '^\s*$|hint|ray job (logs|status|stop)|^Next|Query|Request|INFO' || true
  ray job status --address http://127.0.0.1:8265 rehearsal 2>&1 | grep -o "succeeded\|failed\|stopped" | tail -n 1
  say 'where the ledgers are: at their hospitals'
  for name in head north south; do
    on "$name" "cd ~/.local/state/medfl-ray 2>/dev/null && find . -name ledger.sqlite | sed 's/^/'$name': /'" || true
  done
  kill "$tunnel"
  echo "processes of Ray before ray down: $(ray_processes)"
  say 'ray down onpremise.yaml'
  ray down -y onpremise.yaml </dev/null 2>&1 | grep -vE '^\s*$' | tail -n 4
  tries=0
  until [ "$(ray_processes)" = 0 ] || [ $tries -gt 40 ]; do tries=$((tries + 1)); sleep 0.5; done
  say 'what is left'
  echo "processes of Ray after ray down: $(ray_processes)"
  [ "$(ray_processes)" = 0 ]
}

case $role in
node) node "$2" "$3" ;;
laptop) laptop "$2" ;;
*)
  cd "$(dirname "$0")/../.."
  [ "$(id -u)" = 0 ] || { echo 'rehearse.sh: run it as root; it makes namespaces' >&2; exit 1; }
  [ -n "$(ls dist/medfl_ray-*.whl 2>/dev/null)" ] || { echo 'rehearse.sh: run make wheel first' >&2; exit 1; }
  work=$(mktemp -d /var/tmp/medfl-rehearsal.XXXXXX)
  trap 'rm -rf "$work"' EXIT
  mkdir -p "$work/project/deploy/ray"
  realpath -s "${role:-.venv/bin/python}" >"$work/python"
  prepare "$(<"$work/python")" "$work"
  unshare --net --pid --mount --uts --fork --kill-child --mount-proc bash "$PWD/deploy/ray/rehearse.sh" laptop "$work"
  echo 'the rehearsal is over; its namespaces, and all that ran in them, have ended'
  ;;
esac
