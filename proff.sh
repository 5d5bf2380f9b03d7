. /var/tmp/pump/env.sh
T=/var/tmp/pump/b; S=$T/pf.sock; rm -f $S $T/mmcow-pf*
$PY -m mmcow create -q -f add-cow -b $T/base.raw -F raw $T/mmcow-pf
$PY -m mmcow serve -q --cache none --socket $S $T/mmcow-pf & P=$!; sleep 1
if [ "$1" = perf ]; then perf record -q -o /var/tmp/pump/perf.f -g -p $P sleep 1.4 2>/dev/null & fi
if [ "$1" = strace ]; then timeout 60 strace -f -c -p $P 2>/var/tmp/pump/strace.f & sleep 0.5; fi
if [ "$1" = ctx ]; then grep ctxt /proc/$P/task/*/status > /tmp/ctx1; fi
qemu-img bench -w -f raw -c 8000 -d 1 -s 4k nbd+unix:///?socket=$S | tail -1
if [ "$1" = ctx ]; then grep ctxt /proc/$P/task/*/status; cat /proc/$P/task/*/comm; fi
kill $P; wait
[ "$1" = strace ] && head -16 /var/tmp/pump/strace.f
