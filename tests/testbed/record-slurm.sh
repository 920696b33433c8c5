#!/bin/bash
# Records the output of the real Slurm programs as fixtures of the parsers in knoc-agent/src/scheduler/slurm.
#
#   record-slurm.sh HPC OUT    HPC: the command of the test cluster (PREFIX/bin/hpc), a separate running cluster with
#                              AccountingStorageEnforce=associations,limits,qos in its slurm.conf; takes about 2 minutes,
#                              powers c3 off and on, and cancels all jobs of hpcuser. Needs root.
#                              OUT: knoc-agent/tests/fixtures/slurm-VERSION
# Jobs are named knoc-rec-CASE, so that the lines of a fixture show how they should be read.
set -euo pipefail
hpc=$1 out=$2
mkdir -p "$out/refusals"

# These formats equal those in parse.rs and nodes.rs; a test compares them.
squeue_format='%i|%T|%r|%P|%N|%V|%S|%e|%l|%j|%k'
sacct_format='JobIDRaw,State,Reason,ExitCode,Partition,NodeList,Submit,Start,End,TimelimitRaw,JobName,Comment'
sinfo_format='%N|%P|%a|%l|%L|%t|%c|%m|%d|%G|%f'

user() { "$hpc" exec login -u hpcuser -e TZ=UTC -e LC_ALL=C -e SLURM_TIME_FORMAT=standard "$@"; }
root() { "$hpc" exec ctl "$@"; }
say() { echo "record-slurm: $*" >&2; }

submit() { # CASE SCRIPT [sbatch flags]: prints the job id
    local name=knoc-rec-$1 script=$2
    shift 2
    user sbatch --parsable --job-name="$name" --comment="knoc/1 cluster ns/pod ${name#knoc-} 1" \
        --output=/dev/null --no-requeue --nodes=1 --ntasks=1 --cpus-per-task=1 "$@" --wrap "$script"
}
state_of() { user squeue -h -t all -j "$1" -o %T 2>/dev/null || true; }
await() { # JOB STATE SECONDS
    local end=$((SECONDS + $3))
    while [ $SECONDS -lt $end ]; do
        [ "$(state_of "$1")" != "$2" ] || return 0
        sleep 0.5
    done
    say "job $1 is $(state_of "$1"), not $2, after $3 s"
    return 1
}
snapshot() { # NAME: queue and accounting as they are now
    user squeue --noheader --states=all --me -o "$squeue_format" >"$out/squeue-$1.txt"
    user sacct -P -n -X -D -S now-1hours -o "$sacct_format" >"$out/sacct-$1.txt"
}
refuse() { # CASE COMMAND...: records sbatch's message when it refuses a job on the login node
    local name=$1 code=0
    shift
    # 22.05 retries forever if it cannot resolve the controller's name.
    timeout --kill-after=5 90 "$hpc" exec login -u hpcuser -e LC_ALL=C "$@" >"$out/refusals/$name.txt" 2>&1 </dev/null || code=$?
    [ $code != 0 ] || say "refusal $name: accepted"
    # Only the beginning of the 200 lines about getaddrinfo() in 22.05.
    sed -i "1i exit $code" "$out/refusals/$name.txt"
    sed -i '30,$d' "$out/refusals/$name.txt"
}
bad() { # CASE sbatch flags
    local name=$1
    shift
    refuse "$name" sbatch --parsable --job-name=knoc-rec-refused --output=/dev/null "$@" --wrap true
}

version=$(user sbatch --version)
echo "$version" >"$out/version.txt"
say "$version"

# ---- accounts and limits --------------------------------------------------------------------------------------------
root sacctmgr -i add account proj >/dev/null 2>&1 || true
root sacctmgr -i add user hpcuser account=proj >/dev/null 2>&1 || true
root sacctmgr -i add qos few set MaxSubmitJobsPerUser=1 >/dev/null 2>&1 || true
root sacctmgr -i add qos brief set MaxWall=00:05:00 flags=DenyOnLimit >/dev/null 2>&1 || true
root sacctmgr -i modify user hpcuser set qos=normal,few,brief >/dev/null 2>&1 || true
user scancel --user=hpcuser
for _ in $(seq 40); do user sbatch --test-only --wrap true >/dev/null 2>&1 && break; sleep 0.5; done

# ---- jobs in every state that can be provoked ------------------------------------------------------------------------
timeout=$(submit timeout 'trap "" TERM; sleep 300' --time=1)
completed=$(submit completed 'exit 0')
failed=$(submit failed 'exit 64')
signalled=$(submit signalled 'kill -9 $$')
oom=$(submit oom 'tail /dev/zero' --mem=50)
running=$(submit running 'sleep 600')
nodefail=$(submit nodefail 'sleep 600' --nodelist=c3)
by_admin=$(submit cancelled-by-admin 'sleep 600')
by_user=$(submit cancelled-by-user 'sleep 600')
stopped=$(submit stopped-gracefully 'trap "exit 64" TERM; sleep 600 & wait' --time=10 --signal=B:TERM@60)
suspended=$(submit suspended 'sleep 600')
requeued=$(submit requeued 'sleep 600' --requeue)
completing=$(submit completing 'trap "" TERM; sleep 600')
begin=$(submit pending-begin 'true' --begin=now+2hours)
held=$(submit pending-held 'true' --hold)
cancelled_pending=$(submit cancelled-pending 'true' --begin=now+2hours)
dependency=$(submit pending-dependency 'true' --dependency="afterok:$running")
never=$(submit pending-never 'true' --dependency="afterok:$failed")
limit=$(submit pending-time-limit 'true' --partition=short --time=9)
resources=$(submit pending-resources 'sleep 1' --partition=gpu --exclusive --time=5)
priority=$(submit pending-priority 'sleep 1' --partition=gpu --exclusive --time=5)
user sbatch --parsable --job-name='a|b|knoc-x' --comment=$'x|y\nz' --output=/dev/null --wrap 'sleep 600' >/dev/null
user sbatch --parsable --job-name='knoc-rec-forged' --comment='hello' --output=/dev/null --wrap 'sleep 600' >/dev/null
jobs="$timeout $completed $failed $signalled $oom $running $nodefail $by_admin $by_user $stopped $suspended $requeued"
for job in $running $nodefail $by_admin $by_user $stopped $suspended $requeued $completing; do await "$job" RUNNING 60; done
say "all run: $jobs $begin $held $dependency $never $limit $resources $priority"
sleep 2
user sinfo --noheader --Node -o "$sinfo_format" >"$out/sinfo.txt"
user scontrol show partition -o >"$out/partitions.txt"
snapshot start

root scontrol suspend "$suspended"
root scancel "$by_admin"
user scancel "$by_user" "$cancelled_pending"
user scancel --batch --signal=TERM "$stopped"
root scontrol requeue "$requeued"
root scontrol update nodename=c2 state=drain reason=test
user scancel "$completing"
snapshot middle
"$hpc" node-down c3
root scontrol update nodename=c3 state=down reason=test
sleep 1
user sinfo --noheader --Node -o "$sinfo_format" >"$out/sinfo-down.txt"
await "$nodefail" NODE_FAIL 60
await "$timeout" TIMEOUT 150
await "$oom" OUT_OF_MEMORY 10
sleep 2
snapshot end
for job in $completed $failed $timeout $oom $nodefail $signalled; do user scontrol show job -o "$job"; done >"$out/scontrol-jobs.txt"
{ user scontrol show job -o 999999 || true; } >"$out/scontrol-unknown.txt" 2>&1

# ---- refusals ---------------------------------------------------------------------------------------------------------
say refusals
bad partition --partition=nowhere
bad account --account=nobody
bad qos --qos=nothing
bad cpus --cpus-per-task=1000
bad memory --mem=1000000000
bad nodes --nodes=100
bad gres-unknown --gres=fpga:1
bad gres-too-many --gres=gpu:9
bad constraint --constraint=nothing
bad reservation --reservation=nothing
bad licenses --licenses=nothing:1
bad dependency --dependency=afterok:99999999
bad flag --nonsense
bad time --time=never
bad comment-too-long --comment="$(printf 'x%.0s' $(seq 1100))"
refuse script-too-long sh -c '{ echo "#!/bin/sh"; head -c 6000000 /dev/zero | tr "\\0" "#"; } | sbatch --parsable'
user sbatch --parsable --qos=few --hold --job-name=other --output=/dev/null --wrap true >/dev/null
bad qos-submit-limit --qos=few
bad qos-wall-limit --qos=brief --time=60
root sacctmgr -i modify user hpcuser set MaxSubmitJobs=1 >/dev/null
sleep 1
bad association-submit-limit
root sacctmgr -i modify user hpcuser set MaxSubmitJobs=-1 >/dev/null
root scontrol update partitionname=gpu state=down
bad partition-down --partition=gpu
root scontrol update partitionname=gpu state=inactive
bad partition-inactive --partition=gpu
root scontrol update partitionname=gpu state=drain
bad partition-drain --partition=gpu
root scontrol update partitionname=gpu state=up
user sh -c 'sed "s/10.78.0.2/10.78.0.11/" /etc/slurm/slurm.conf >/tmp/away.conf'
refuse controller-away env SLURM_CONF=/tmp/away.conf sbatch --parsable --wrap true
refuse no-configuration env SLURM_CONF=/nonexistent sbatch --parsable --wrap true
user sh -c 'sed "s/ctl(10.78.0.2)/nowhere/" /etc/slurm/slurm.conf >/tmp/unknown.conf'
refuse controller-unknown env SLURM_CONF=/tmp/unknown.conf sbatch --parsable --wrap true
"$hpc" exec login sh -c 'mv /run/munge /run/munge.away'
bad munge-away
"$hpc" exec login sh -c 'mv /run/munge.away /run/munge'
root sh -c 'kill -STOP $(cat /run/slurm/slurmctld.pid)'
bad controller-hangs
root sh -c 'kill -CONT $(cat /run/slurm/slurmctld.pid)'
root sh -c 'kill -TERM $(cat /run/slurm/slurmdbd.pid)'
sleep 1
{ user sacct -P -n -X -j 1 -o "$sacct_format" || echo "exit $?"; } >"$out/sacct-away.txt" 2>&1
root setpriv --reuid=slurm --regid=slurm --clear-groups -- slurmdbd

# ---- as it was ----------------------------------------------------------------------------------------------------------
user scancel --user=hpcuser
root scontrol update nodename=c2 state=resume
"$hpc" node-up c3
root scontrol update nodename=c3 state=resume || true
say "done: $(ls "$out" | wc -l) files in $out"
