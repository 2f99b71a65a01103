#!/bin/sh
# The demo image's command: says where it runs. Shell built-ins only, since every new process costs the guest.
read -r _ _ release _ </proc/version
read -r up _ </proc/uptime
read -r host </proc/sys/kernel/hostname
cpus=0
while read -r key _; do
  [ "$key" = processor ] && cpus=$((cpus + 1))
done </proc/cpuinfo
while read -r key kib _; do
  [ "$key" = MemTotal: ] && break
done </proc/meminfo
processes=0
for dir in /proc/[0-9]*; do
  processes=$((processes + 1))
done
echo "      )"
echo "     ( (       Hello from a microVM."
echo "    ) ) )"
echo "   .-----.     host name  $host"
echo "  /  ___  \\    kernel     Linux $release, up $up s"
echo " |  |###|  |   machine    $cpus processor(s), $((kib / 1024)) MiB, $processes processes"
echo " |__|###|__|   root       OCI image by way of EROFS, writable"
