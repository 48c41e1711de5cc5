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

// namedHolders is how many agents are named before the rest is counted.
const namedHolders = 5

// The reasons of a [Holder] that the estimate depends on.
const (
	reasonSilent       = "silent"
	reasonUnidentified = "unidentified"
	reasonDuplicated   = "duplicated"
	reasonBehind       = "behind"
	reasonRestored     = "restored"
)

// unknown tells whether it is not known what the agent holds, so that only the
// expiry of it ends the wait, or a person.
func (h Holder) unknown() bool {
	switch h.Reason {
	case reasonSilent, reasonUnidentified, reasonDuplicated, reasonRestored:
		return true
	}
	return false
}

// over is when what the agent holds has expired for everybody; zero when nobody
// can say.
func (h Holder) over() time.Time {
	if h.LatestExpiry.IsZero() {
		return time.Time{}
	}
	return clock.Over(h.LatestExpiry)
}

// end is when the agent is expected to hold nothing of the keyset any more;
// zero when nobody can say. Where it is not known what the agent holds, that is
// when all of it has expired.
func (h Holder) end(now time.Time) time.Time {
	if h.unknown() {
		return h.over()
	}
	begins := now
	switch {
	case h.BeginsAt.After(now):
		begins = h.BeginsAt
	case h.Reason == reasonBehind && h.BeginsAt.IsZero():
		begins = now.Add(wave.DefaultMaxDelay) // it has not drawn its delay yet
	}
	rate := h.Rate
	if rate <= 0 {
		rate = wave.DefaultRate
	}
	end := begins.Add(time.Duration(float64(h.SVIDs) / rate * float64(time.Second)))
	if over := h.over(); !over.IsZero() && over.Before(end) {
		return over
	}
	return end
}

// estimate is when the last of the agents is done, and why that one is counted.
// The zero time means that nobody can say.
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

// estimated puts the estimate into words; empty when there is none.
func estimated(holders []Holder, now time.Time) string {
	end, reason := estimate(holders, now)
	switch {
	case len(holders) == 0:
		return ""
	case end.IsZero():
		return "has no known end: an agent is " + reason
	case reason == reasonRestored:
		return "ends at the latest " + when(end, now) + ", when what is not known has expired by all clocks"
	case reason == reasonDuplicated:
		return "ends at the latest " + when(end, now) + ", when what duplicated agents hold has expired by all clocks"
	case reason == reasonSilent:
		return "ends at the latest " + when(end, now) + ", when what silent agents hold has expired by all clocks"
	}
	return "ends about " + when(end, now)
}

// byEnd orders agents so that those to look after come first.
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

// says is what an agent holds and why it is counted.
func (h Holder) says(now time.Time) string {
	text := counted(h.SVIDs, "SVID")
	switch h.Reason {
	case reasonSilent:
		text += ", silent"
		if h.LastReport.IsZero() {
			text += ": it has never reported"
		} else {
			text += " since " + when(h.LastReport, now)
		}
		switch {
		case h.LatestExpiry.IsZero():
		case h.LatestExpiry.After(now):
			text += ", the last expires " + when(h.LatestExpiry, now)
		default:
			text += ", the last expired " + when(h.LatestExpiry, now)
		}
	case reasonBehind:
		text += ", behind: it has not seen the taint yet"
		if h.Version != "" {
			text += " (version " + cli.Printable(h.Version) + ")"
		}
	case reasonUnidentified:
		text += ", unidentified: it exports no SPIFFE ID of its own"
		if h.Version != "" {
			text += " (version " + cli.Printable(h.Version) + ")"
		}
		text += "; wait until it is attested, or upgrade it"
	case reasonDuplicated:
		text += ", duplicated: two processes use its identity; evict it, remove data_dir on both nodes and attest each with an ID of its own"
	case "waiting":
		text += ", waiting for its random delay"
		if h.BeginsAt.After(now) {
			text += ", begins in " + short(h.BeginsAt.Sub(now))
		}
	case "renewing":
		text += ", renewing"
	case "streams":
		text += ", replaced but not yet read by " + counted(h.Streams, "workload")
	case "signing":
		text += ", an answer to it is on its way"
	default:
		text += ", " + h.Reason
	}
	return text
}

// line is what is said of an agent in a list. Where signatures are on their way
// it is not known yet to whom, and there is no agent.
func (h Holder) line(now time.Time) string {
	if h.Reason == reasonRestored {
		return h.name()
	}
	if h.Agent == "" {
		return h.name() + ": for whom is not known yet"
	}
	return cli.Printable(h.Agent) + ": " + h.says(now)
}

// name is a few words on an agent. All agents are of one trust domain; what tells
// them apart is the path.
func (h Holder) name() string {
	if h.Reason == reasonRestored {
		return "restored from a copy of " + stamp(h.LastReport) + "; what was signed since is not known"
	}
	if h.Agent == "" {
		return counted(h.SVIDs, "SVID") + " being signed"
	}
	name, ofSPIFFE := strings.CutPrefix(h.Agent, "spiffe://")
	if _, path, ok := strings.Cut(name, "/"); ok && ofSPIFFE {
		name = "/" + path
	}
	return cli.Printable(name) + " " + h.Reason
}

// hanging says on lines of its own what hangs on a keyset's X.509 key: how
// much, who and why, and until when.
func hanging(k Keyset, holders []Holder, err error, now time.Time) string {
	var lines []string
	switch {
	case k.Unknown != "":
		lines = append(lines, "What hangs on it is not known: "+cli.Printable(k.Unknown))
	case k.X509SVIDs < 0:
		lines = append(lines, "How many X.509-SVIDs hang on it is not known.")
	default:
		lines = append(lines, fmt.Sprintf("%s on it.", left(k, holders, "hang")))
	}
	if err != nil {
		lines = append(lines, "Which agents hold them is not known: "+cli.Printable(err.Error()))
	}
	for i, h := range byEnd(holders, now) {
		if i == namedHolders {
			lines = append(lines, fmt.Sprintf("  and %d more", len(holders)-i))
			break
		}
		lines = append(lines, "  "+h.line(now))
	}
	if text := estimated(holders, now); text != "" {
		lines = append(lines, "It "+text+".")
	}
	return strings.Join(lines, "\n")
}

// left counts what is left: "12 X.509-SVIDs of 3 agents hang".
func left(k Keyset, holders []Holder, verb string) string {
	what, agents := "X.509-SVID", 0
	for _, h := range holders {
		if h.Reason == reasonRestored {
			what = "known X.509-SVID"
		}
		if h.Agent != "" {
			agents++
		}
	}
	text := counted(k.X509SVIDs, what)
	if agents > 0 {
		text += " of " + counted(agents, "agent")
	}
	if k.X509SVIDs == 1 && verb == "hang" {
		verb = "hangs"
	}
	return text + " " + verb
}
