#!/usr/bin/env bash
# To set log_format of a SPIRE server to its default changes the time stamps.
#
# Seen with   SPIRE 1.13.3
# Behaviour   The documentation calls "text" the default of log_format. Without the setting a line's time has
#             whole seconds; with log_format = "text" it has nanoseconds.
# Operators   Set log_format where a log is to tell the order of events on several machines, or how
#             many SVIDs were signed in one second. A parser of the one form may not read the other.
# renewd      counts the renewals of a wave in such a log, in its tests alone (test/system).
#
# Output seen
#   not set: time="YYYY-MM-DDThh:mm:ssZ"
#   text: time="YYYY-MM-DDThh:mm:ss.nZ"
source "$(dirname "$0")/lib.sh"
spire 1.13.3
stamp() {
	sed -n '1,/time=/s/.*\(time="[^"]*"\).*/\1/p' "$1" | head -1 |
		sed -E 's/[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}/YYYY-MM-DDThh:mm:ss/; s/\.[0-9]+/.n/; s/(Z|[+-][0-9]{2}:[0-9]{2})"$/Z"/'
}
for name in plain text; do
	spire_conf $name
	sed -i 's/log_level = "WARN"/log_level = "INFO"/' $name.conf
done
sed -i 's/log_level = "INFO"/log_level = "INFO"\n\tlog_format = "text"/' text.conf
for name in plain text; do
	background $name.log spire-server run -config $name.conf
	until_true 60 grep -q 'time=' $name.log
done
{
	echo "not set: $(stamp plain.log)"
	echo "text: $(stamp text.log)"
} >seen
expect <<'SEEN'
not set: time="YYYY-MM-DDThh:mm:ssZ"
text: time="YYYY-MM-DDThh:mm:ss.nZ"
SEEN
