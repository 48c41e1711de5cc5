package runbook

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/renew/wave"
)

// maxNamedHolders is how many agents an error names; it counts the others.
const maxNamedHolders = 5

// The reasons of a [Holder].
const (
	reasonSilent       = "silent"
	reasonUnidentified = "unidentified"
	reasonDuplicated   = "duplicated"
	reasonBehind       = "behind"
	reasonRestored     = "restored"
	reasonSettling     = "settling"
	reasonWaiting      = "waiting"
	reasonRenewing     = "renewing"
	reasonStreams      = "streams"
	reasonSigning      = "signing"
)

// reconnectGrace is how long a restarted agent waits for workloads that it does not know,
// at most.
const reconnectGrace = 3 * time.Minute

// holdingsUnknown reports whether it is not known what the agent holds. Only expiry,
// or an operator, ends the wait for such an agent.
func (h Holder) holdingsUnknown() bool {
	switch h.Reason {
	case reasonSilent, reasonUnidentified, reasonDuplicated, reasonRestored:
		return true
	}
	return false
}

// expiredForAll returns when the agent's SVIDs have expired by every clock. It is
// zero if that is not known.
func (h Holder) expiredForAll() time.Time {
	if h.LatestExpiry.IsZero() {
		return time.Time{}
	}
	return clock.Over(h.LatestExpiry)
}

// end returns when the agent is expected to hold no SVID of the keyset, at the latest
// by expiry. It is zero if there is no estimate.
func (h Holder) end(now time.Time) time.Time {
	if h.holdingsUnknown() {
		return h.expiredForAll()
	}
	begins := now
	switch {
	case h.BeginsAt.After(now):
		begins = h.BeginsAt
	case h.Reason == reasonBehind && h.BeginsAt.IsZero():
		begins = now.Add(wave.DefaultMaxDelay) // its delay is not known yet
	case h.Reason == reasonSettling:
		return now.Add(reconnectGrace) // since when is not known
	}
	rate := h.Rate
	if rate <= 0 {
		rate = wave.DefaultRate
	}
	end := begins.Add(time.Duration(float64(h.SVIDs) / rate * float64(time.Second)))
	if over := h.expiredForAll(); !over.IsZero() && over.Before(end) {
		return over
	}
	return end
}

// estimate returns when the last agent is done, and the reason of that agent. The
// time is zero if there is no estimate.
func estimate(holders []Holder, now time.Time) (end time.Time, reason string) {
	for _, h := range holders {
		e := h.end(now)
		if e.IsZero() {
			return time.Time{}, h.Reason
		}
		if e.After(end) {
			end, reason = e, h.Reason
		}
	}
	return end, reason
}

// estimated describes the estimate for an error. It is empty without holders.
func estimated(holders []Holder, now time.Time) string {
	end, reason := estimate(holders, now)
	switch {
	case len(holders) == 0:
		return ""
	case end.IsZero():
		return "has no known end: an agent is " + reason
	case reason == reasonRestored:
		return "ends at the latest " + timeAndDistance(end, now) + ", when the unknown SVIDs have expired by all clocks"
	case reason == reasonDuplicated:
		return "ends at the latest " + timeAndDistance(end, now) + ", when the SVIDs of duplicated agents have expired by all clocks"
	case reason == reasonSilent:
		return "ends at the latest " + timeAndDistance(end, now) + ", when the SVIDs of silent agents have expired by all clocks"
	}
	if reason == reasonSettling {
		return "ends at the latest " + timeAndDistance(end, now) + ", when restarted agents have waited for their workloads"
	}
	return "ends about " + timeAndDistance(end, now)
}

// byEnd sorts agents: those without an estimate first, then the latest.
func byEnd(holders []Holder, now time.Time) []Holder {
	sorted := slices.Clone(holders)
	slices.SortFunc(sorted, func(a, b Holder) int {
		ea, eb := a.end(now), b.end(now)
		if ea.IsZero() != eb.IsZero() {
			return map[bool]int{true: -1, false: 1}[ea.IsZero()]
		}
		return cmp.Or(eb.Compare(ea), cmp.Compare(a.Agent, b.Agent))
	})
	return sorted
}

// moment is the time for which an agent is described.
type moment struct {
	now     time.Time
	started time.Time // of the server, which keeps no reports over a restart; zero: not known
}

// noReportYet reports whether the server has had no report since it started.
func (h Holder) noReportYet(started time.Time) bool {
	return h.LastReport.IsZero() || h.LastReport.Before(started)
}

// silence says since when the agent has not reported. An agent that has not reported
// since the server started may be healthy.
func (h Holder) silence(at moment) string {
	switch {
	case h.noReportYet(at.started) && at.started.IsZero():
		return "no report yet"
	case h.noReportYet(at.started):
		return "no report since the server started (" + roughly(at.now.Sub(at.started)) + " ago)"
	}
	return "no report for " + roughly(at.now.Sub(h.LastReport))
}

// versioned returns text about the agent's version. It is empty if that is not known.
func (h Holder) versioned(before, after string) string {
	if h.Version == "" {
		return ""
	}
	return before + "version " + cli.Printable(h.Version) + after
}

// fact describes the agent in a few words, the most important first. most is how many
// SVIDs it had at the most.
func (h Holder) fact(most int, at moment) string {
	held := ""
	if h.SVIDs > 0 {
		held = ", " + quantity(h.SVIDs, "SVID")
	}
	switch h.Reason {
	case reasonSilent:
		text := h.silence(at) + held + h.versioned(", ", "")
		if over := h.expiredForAll(); over.After(at.now) {
			text += ", expire in " + formatDuration(over.Sub(at.now))
		}
		return text
	case reasonBehind:
		text := "bundle not applied" + h.versioned(", ", "")
		if !h.LastReport.IsZero() {
			text += ", reported " + roughly(at.now.Sub(h.LastReport)) + " ago"
		}
		return text + held
	case reasonUnidentified:
		return "no agent ID" + h.versioned(", ", "") + held
	case reasonDuplicated:
		return "two processes use its identity" + held
	case reasonWaiting:
		if h.BeginsAt.After(at.now) {
			return "begins in " + formatDuration(h.BeginsAt.Sub(at.now)) + held
		}
		return "begins now" + held
	case reasonRenewing:
		return fmt.Sprintf("%d of %s left", h.SVIDs, quantity(max(most, h.SVIDs), "SVID"))
	case reasonStreams:
		return fmt.Sprintf("%s %s not read the replacement", quantity(h.Streams, "workload"), hasOrHave(h.Streams))
	case reasonSettling:
		return "restarted, waits up to " + formatDuration(reconnectGrace) + " for its workloads"
	case reasonSigning:
		return quantity(h.SVIDs, "SVID") + " being signed"
	case reasonRestored:
		return "copy of " + formatTime(h.LastReport) + "; what was signed since is not known"
	}
	return strings.TrimPrefix(held, ", ")
}

// describe says what the agent holds and why it is counted.
func (h Holder) describe(at moment) string {
	text, now := quantity(h.SVIDs, "SVID"), at.now
	switch h.Reason {
	case reasonSilent:
		switch {
		case !h.noReportYet(at.started):
			text += ", silent since " + timeAndDistance(h.LastReport, now)
		case at.started.IsZero():
			text += ", silent: " + h.silence(at)
		default:
			text += ", " + h.silence(at)
		}
		text += h.versioned(" (", ")")
		switch {
		case h.LatestExpiry.IsZero():
		case h.LatestExpiry.After(now):
			text += ", the last expires " + timeAndDistance(h.LatestExpiry, now)
		default:
			text += ", the last expired " + timeAndDistance(h.LatestExpiry, now)
		}
	case reasonBehind:
		text += ", behind: it has not applied the taint yet" + h.versioned(" (", ")")
	case reasonUnidentified:
		text += ", unidentified: it exports no agent ID" + h.versioned(" (", ")") + "; wait until it is attested, or upgrade it"
	case reasonDuplicated:
		text += ", duplicated: two processes use its identity; evict it, remove data_dir on both nodes and attest each with its own ID"
	case reasonWaiting:
		text += ", waiting for its random delay"
		if h.BeginsAt.After(now) {
			text += ", begins in " + formatDuration(h.BeginsAt.Sub(now))
		}
	case reasonRenewing:
		text += ", renewing"
	case reasonStreams:
		text += ", replaced but not yet read by " + quantity(h.Streams, "workload")
	case reasonSettling:
		text += ", replaced; restarted, it waits up to " + formatDuration(reconnectGrace) + " for workloads that may hold one"
	case reasonSigning:
		text += ", being sent its SVIDs"
	default:
		text += ", " + h.Reason
	}
	return text
}

// line returns an agent's line of an error. Signatures in flight have no agent yet.
func (h Holder) line(at moment) string {
	if h.Reason == reasonRestored {
		return h.name()
	}
	if h.Agent == "" {
		return h.name() + ": agent not known yet"
	}
	return h.full() + ": " + h.describe(at)
}

// host returns the hostname of the agent's node, or else the label of its token, because
// the ID of a join token tells nobody which node it is. It is empty if neither is known.
func (h Holder) host() string {
	return strings.Join(strings.Fields(cli.Printable(cmp.Or(h.Hostname, h.Label))), "_")
}

// full returns the agent's complete ID, after the node's name.
func (h Holder) full() string {
	return strings.TrimPrefix(h.host()+" "+cli.Printable(h.Agent), " ")
}

// who is full with the path of the ID only, because all are of one trust domain. It is
// empty if the agent is not known.
func (h Holder) who() string {
	name, ofSPIFFE := strings.CutPrefix(h.Agent, "spiffe://")
	if _, path, ok := strings.Cut(name, "/"); ok && ofSPIFFE {
		name = "/" + path
	}
	return strings.Trim(h.host()+" "+cli.Printable(name), " ")
}

// name returns who the agent is and the reason.
func (h Holder) name() string {
	if h.Reason == reasonRestored {
		return "restored from a copy of " + formatTime(h.LastReport) + "; SVIDs signed since then are not known"
	}
	if h.Agent == "" {
		return quantity(h.SVIDs, "SVID") + " being signed"
	}
	return h.who() + " " + h.Reason
}

// describeDependents says in several lines how many SVIDs depend on a keyset's X.509
// key, which agents hold them, why and until when.
func describeDependents(k Keyset, holders []Holder, err error, at moment) string {
	var lines []string
	switch {
	case k.Unknown != "":
		lines = append(lines, "The SVIDs that depend on it are not known: "+cli.Printable(k.Unknown))
	case k.X509SVIDs < 0:
		lines = append(lines, "The number of X.509-SVIDs that depend on it is not known.")
	case k.X509SVIDs == 1:
		lines = append(lines, remaining(k, holders)+" depends on it.")
	default:
		lines = append(lines, remaining(k, holders)+" depend on it.")
	}
	if err != nil {
		lines = append(lines, "The agents that hold them are not known: "+cli.Printable(err.Error()))
	}
	for i, h := range byEnd(holders, at.now) {
		if i == maxNamedHolders {
			lines = append(lines, fmt.Sprintf("  and %d more", len(holders)-i))
			break
		}
		lines = append(lines, "  "+h.line(at))
	}
	if text := estimated(holders, at.now); text != "" {
		lines = append(lines, "It "+text+".")
	}
	return strings.Join(lines, "\n")
}

// remaining returns text such as "12 X.509-SVIDs of 3 agents".
func remaining(k Keyset, holders []Holder) string {
	what, agents := "X.509-SVID", 0
	for _, h := range holders {
		if h.Reason == reasonRestored {
			what = "known X.509-SVID"
		}
		if h.Agent != "" {
			agents++
		}
	}
	text := quantity(k.X509SVIDs, what)
	if agents > 0 {
		text += " of " + quantity(agents, "agent")
	}
	return text
}
