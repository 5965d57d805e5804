#!/usr/bin/env bash
# Rehearses deploy/ray/onpremise.yaml on one Linux machine, without touching it: a laptop, a head and two hospitals, each
# in PID, network and mount namespaces of its own, the nodes with an sshd of their own. Everything that ray up, ray job
# submit and ray down do is done; `ray stop` reaches only the namespace that it runs in. Needs root, iproute2,
# openssh-server, openssh-client, rsync and the project's environment (make install).
# A node sees its own home; all else of the machine is read-only there, and `ray stop` sees no process of it.
#   sudo deploy/ray/rehearse.sh [PYTHON]
# rehearsal.log is what a run has said; paths of the machine and secrets are taken out before anything is written.
set -euo pipefail
role=${1:-}
address_of() { case $1 in head) echo 10.77.0.10 ;; north) echo 10.77.0.11 ;; south) echo 10.77.0.12 ;; esac; }

prepare() { # $1 = the project's python: the homes of laptop and nodes, as an administrator would find them
  local python=$1 work=$2 name
  "$python" -c 'import sys; print("\n".join(p for p in sys.path if p.endswith("site-packages")))' >"$work/packages"
  install -d -m 700 "$work/laptop/.ssh"
  ssh-keygen -q -t ed25519 -N '' -f "$work/laptop/.ssh/id_ed25519"
  sed 's#^root:.*#root:x:0:0:root:/mnt/medfl:/bin/bash#' /etc/passwd >"$work/passwd"
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
    printf '#!/mnt/medfl/medfl/env/bin/python\nfrom ray.scripts.scripts import main\nmain()\n' >"$work/$name/medfl/env/bin/ray"
    sed -i '1s#.*#\#!/mnt/medfl/medfl/env/bin/python#' "$work/$name/medfl/env/bin/ray"
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
    {"id": name, "directory": "/mnt/medfl/data", "num_patients": 10, "max_epsilon": 100} for name in ("north", "south")
]
job = {
    "name": "rehearsal",
    "data": {"hospitals": hospitals, "labels": {1: "core", 2: "oedema"}, "channels": ["T1"], "name": "heads"},
    "model": {"type": "unet3d", "features": [4, 8]},
    "training": {"learning_rate": 0.01, "patch_size_voxels": 16, "device": "cpu"},
    "federation": {"rounds": 3, "local_steps": 2, "min_clients": 2},
    "privacy": {"enable_dp": True, "epsilon": 30, "max_grad_norm": 0.5, "sample_rate": 0.5},
    "output": {"directory": "/mnt/medfl/runs", "report": False},
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
  mount -t tmpfs tmpfs /mnt && mkdir /mnt/medfl && mount --bind "$work/$name" /mnt/medfl
  mount --bind "$work/passwd" /etc/passwd
  mount -t tmpfs tmpfs /tmp && mount -t tmpfs tmpfs /dev/shm && mount -t tmpfs tmpfs /run && mkdir /run/sshd
  mount -o remount,bind,ro /
  exec /usr/sbin/sshd -D -e -f /dev/null -h /mnt/medfl/.ssh/host_key -o UsePAM=no -o PidFile=none \
    -o ListenAddress="$(address_of "$name")" -o PasswordAuthentication=no -o PermitRootLogin=prohibit-password
}

say() { printf '\n=== %s\n' "$*"; }
fail() { printf 'rehearse.sh: %s\n' "$*" >&2; exit 1; }
on() { ssh -q -i ~/.ssh/id_ed25519 -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null "root@$(address_of "$1")" "${@:2}"; }
ray() { "$python" -c 'from ray.scripts.scripts import main; main()' "$@"; }
at_head() { on head ". ~/medfl/node/ray.env; export PATH=~/medfl/env/bin:\$PATH; $*"; }
joins() { on north "$1 timeout 120 ~/medfl/env/bin/python -c \"import ray; ray.init('10.77.0.10:6379')\"" >/dev/null 2>&1; }
ray_processes() { # of all namespaces below this one
  local found=0 process
  for process in /proc/[0-9]*; do
    if { tr '\0' ' ' <"$process/cmdline"; } 2>/dev/null |
      grep -qE 'raylet|gcs_server|ray::|/ray/(_private|dashboard|autoscaler|util)/|medfl/env/bin/'; then
      found=$((found + 1))
    fi
  done
  echo "$found"
}

network() { # $1 = work folder: a switch, and the three machines on it
  local work=$1 name
  hostname laptop
  mount -t tmpfs tmpfs /tmp && mount -t tmpfs tmpfs /dev/shm
  ip link set lo up
  ip link add switch type bridge && ip address add 10.77.0.1/24 dev switch && ip link set switch up
  for name in head north south; do
    unshare --net --pid --mount --uts --ipc --fork --kill-child --mount-proc bash "$0" node "$work" "$name" 2>"$work/$name.log" &
    ip link add "to-$name" type veth peer name "eth-$name"
    ip link set "to-$name" master switch up
    until [ "$(readlink "/proc/$!/ns/net")" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
    ip link set "eth-$name" netns $! name eth0
    until on "$name" true; do sleep 0.3; done
  done
}

alone() { # a node sees its own sshd and what that started: only then may anything call `ray stop` there
  local name=$1 seen
  seen=$(on "$name" 'cat /proc/1/comm; ps -e -o comm=')
  [ "$(head -n 1 <<<"$seen")" = sshd ] || fail "$name: the first process is not its sshd"
  ! grep -vE '^(sshd.*|bash|ps)$' <<<"$seen" || fail "$name sees these processes of others"
  ! on "$name" "touch /etc/of-the-node || touch $work/of-the-node" 2>/dev/null || fail "$name can write outside its home"
  echo "$name sees $(tail -n +2 <<<"$seen" | sort | uniq -c | awk '{ print $1, $2 }' | paste -sd, | sed 's/,/, /g'); writes only in its home"
}

cluster_starts() {
  local name tries=0
  say 'what each node sees of this machine'
  for name in head north south; do alone "$name"; done
  say 'ray up onpremise.yaml'
  ray up -y --no-config-cache onpremise.yaml </dev/null >"$work/up.log" 2>&1 || { tail -n 60 "$work/up.log"; exit 1; }
  sed -E 's/\x1b\[[0-9;]*m//g' "$work/up.log" | grep -oE 'Setting up head node|New status: .*|Ray runtime started'
  say 'ray status, at the head'
  until at_head ray status >"$work/status" 2>/dev/null && grep -q 'hospital:south' "$work/status" && grep -q 'hospital:north' "$work/status"; do
    tries=$((tries + 1))
    [ $tries -lt 90 ] || { at_head 'ray status; tail -n 40 /tmp/ray/session_latest/logs/monitor.*'; exit 1; }
    sleep 2
  done
  sed -n '/^Total Usage/,/^$/p;/^Active/,/^Pending/p' "$work/status"
  say 'each hospital renders its own images (a real one has them)'
  for name in north south; do
    on "$name" "~/medfl/env/bin/medfl-ray data make ~/data --hospitals 1 --patients 12 --size 16 --layout manifest --seed \$RANDOM" | grep '^wrote'
  done
}

strangers_are_refused() {
  say 'who joins'
  joins '. ~/medfl/node/ray.env;' || fail 'a node with certificate and token could not join'
  echo 'joined with certificate and token'
  ! joins 'export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=0000;' || fail 'joined without a certificate'
  echo 'refused without a certificate'
  ! joins '. ~/medfl/node/ray.env; unset RAY_AUTH_TOKEN_PATH; export RAY_AUTH_TOKEN=0000;' || fail 'joined without the token'
  echo 'refused without the token'
  say 'the dashboard listens on the head, at'
  at_head ss -Hltn | awk '$4 ~ /:8265$/ { print $4 }' | tee "$work/dashboard"
  [ "$(<"$work/dashboard")" = 127.0.0.1:8265 ] || fail 'the dashboard listens elsewhere'
}

job_runs() {
  local tunnel name where=(--address http://127.0.0.1:8265)
  say 'ray dashboard onpremise.yaml'
  ray dashboard onpremise.yaml >/dev/null 2>&1 </dev/null &
  tunnel=$!
  until curl -s -o /dev/null http://127.0.0.1:8265; do sleep 0.5; done
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$work/project/deploy/ray/secrets/auth_token
  curl -s -o /dev/null -w 'jobs without the token: HTTP %{http_code}\n' http://127.0.0.1:8265/api/jobs/ | tee "$work/refused"
  grep -q 401 "$work/refused" || fail 'the job API answers whoever asks'
  say 'ray job submit --working-dir job -- medfl-ray run run.yaml'
  ray job submit "${where[@]}" --submission-id rehearsal --working-dir job -- medfl-ray run run.yaml >"$work/job.log" 2>&1 || true
  sed -E 's/\x1b\[[0-9;]*m//g; s/^[-0-9]+ [:,0-9]+\s(SUCC|ERR) cli.py:[0-9]+ -- //; /^-+$/d' "$work/job.log" |
    grep -vE '^\s*$|hint|ray job (logs|status|stop)|^Next|Query|Request|INFO' || true
  ray job status "${where[@]}" rehearsal 2>&1 | grep -o 'succeeded\|failed\|stopped' | tail -n 1 | tee "$work/outcome"
  [ "$(<"$work/outcome")" = succeeded ] || fail 'the job did not succeed'
  say 'where the ledgers are: at their hospitals'
  for name in head north south; do
    on "$name" "cd ~/.local/state/medfl-ray 2>/dev/null && find . -name ledger.sqlite | sed 's/^/'$name': /'" || true
  done
  kill "$tunnel"
}

cluster_ends() {
  local began
  say 'ray down onpremise.yaml'
  echo "processes of Ray before: $(ray_processes)"
  ray down -y onpremise.yaml </dev/null 2>&1 | sed -E 's/\x1b\[[0-9;]*m//g; s/^[-0-9]+ [:,0-9]+\s[A-Z]+ [a-z_]+.py:[0-9]+ -- //' |
    grep -E 'Stopped|stopped|not found|shut down|remaining'
  # It stops the head; the hospitals' Ray ends by itself when the head has been silent for a minute.
  began=$SECONDS
  until [ "$(ray_processes)" = 0 ] || [ $((SECONDS - began)) -gt 180 ]; do sleep 1; done
  echo "processes of Ray $((SECONDS - began)) s later: $(ray_processes)"
  [ "$(ray_processes)" = 0 ] || fail 'ray down left processes behind'
}

laptop() { # $1 = work folder: what an administrator and a data scientist type
  work=$1 python=$(<"$1/python")
  trap 'exit 130' INT TERM # the first process of a namespace takes no signal that it has not asked for
  export HOME=$work/laptop RAY_USAGE_STATS_ENABLED=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 PYTHONWARNINGS=ignore
  "$python" -c 'import platform, ray; print(f"Ray {ray.__version__}, Python {platform.python_version()}, Linux", ".".join(platform.release().split(".")[:2]))'
  network "$work"
  cd "$work/project"
  cluster_starts
  strangers_are_refused
  job_runs
  cluster_ends
  say "over after $SECONDS s"
}

scrubbed() { # without colours, secrets and this machine's paths
  sed -u -E "s/\\x1b\\[[0-9;]*m//g; s#$work#WORK#g; s#$PWD#PROJECT#g; s#${HOME:-/root}/#~/#g; s/\\b[0-9a-f]{64}\\b/SECRET/g"
}

case $role in
node) node "$2" "$3" ;;
laptop) laptop "$2" ;;
*)
  cd "$(dirname "$0")/../.."
  [ "$(id -u)" = 0 ] || fail 'run it as root; it makes namespaces'
  [ -n "$(ls dist/medfl_ray-*.whl 2>/dev/null)" ] || fail 'run make wheel first'
  for tool in ip ssh ssh-keygen rsync curl /usr/sbin/sshd; do command -v "$tool" >/dev/null || fail "$tool is missing"; done
  work=$(mktemp -d /var/tmp/medfl-rehearsal.XXXXXX)
  trap 'rm -rf "$work"' EXIT
  mkdir -p "$work/project/deploy/ray"
  realpath -s "${role:-.venv/bin/python}" >"$work/python"
  prepare "$(<"$work/python")" "$work"
  unshare --net --pid --mount --uts --ipc --fork --kill-child --mount-proc bash "$PWD/deploy/ray/rehearse.sh" laptop "$work" 2>&1 | scrubbed
  echo 'the namespaces, and all that ran in them, have ended'
  ;;
esac
