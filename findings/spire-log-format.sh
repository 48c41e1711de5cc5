#!/usr/bin/env bash
# Setting log_format of a SPIRE server to its default changes the timestamps.
#
# Seen with   SPIRE 1.13.3
# Behaviour   The documented default of log_format is "text". Without the setting the time of a log
#             line has whole seconds; with log_format = "text" it has nanoseconds.
# Operators   Set log_format if you need the order of events on several machines, or the number of
#             SVIDs signed in a second. A parser of one form may not accept the other.
# renewd      counts the renewals of a wave in such a log, only in tests (test/system).
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
