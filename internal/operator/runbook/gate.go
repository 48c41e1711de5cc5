package runbook

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/renewd/renewd/internal/cli"
)

// GateTimeout is how long [Gate] waits for the agents. They refresh the trust bundle
// every few seconds, and a Prometheus scrapes them every 15 or 30 seconds.
const GateTimeout = time.Minute

// Gate checks, before the step activate or taint, that every agent has applied the trust
// bundle: the workloads of others could not verify what the new keyset signs. It waits
// for the agents for at most [GateTimeout], and then returns a [NotSafeError] that names
// those that are behind. If that cannot be known, a remark says so. Gate returns nothing
// if the keyset is not Prepared, because the server has its own error for the step. It
// does not repeat a first look that fails.
func Gate(ctx context.Context, b Backend, step Step, o WaitOptions) (remarks []string, err error) {
	o = o.withDefaults()
	o.Timeout = GateTimeout
	s, err := status(ctx, b)
	if err != nil {
		return nil, fmt.Errorf("nothing was changed: %w", err)
	}
	switch k, found := find(s, step.Keyset); {
	case !found || k.State != Prepared:
		return nil, nil
	case !knowsBehind(s) && k.Unknowable:
		return []string{agentsBehindNotKnown + ": " + cli.Printable(k.Unknown) + "."}, nil
	}
	err = awaitBundleApplied(ctx, b, step, o, fmt.Sprintf("keysetctl %s %s --force", step.Action, step.Keyset))
	if notSafe, ok := errors.AsType[*NotSafeError](err); ok {
		notSafe.Message = "nothing was changed: " + notSafe.Message
	}
	return nil, err
}

// knowsBehind reports whether it is known how many agents are behind.
func knowsBehind(s Status) bool { return s.Agents >= 0 && s.AgentsBehind >= 0 }

// awaitBundleApplied waits until every agent has applied the trust bundle. without is how
// the operator continues without those that have not.
func awaitBundleApplied(ctx context.Context, b Backend, step Step, o WaitOptions, without string) error {
	var last *Status
	var lastErr error
	begun := o.Now()
	err := await(ctx, o, step.Keyset, func(ctx context.Context) (bool, *display, error) {
		s, err := b.Status(ctx)
		if err != nil {
			lastErr = err
			return false, nil, err
		}
		last = &s
		if s.Agents >= 0 && s.AgentsBehind == 0 {
			return true, nil, nil
		}
		return false, showBehind(s, step, begun, without), nil
	})
	switch {
	case errors.Is(err, errTimeout):
		state := noAnswer(lastErr)
		if last != nil {
			state = describeBehind(*last, step, o.Now())
		}
		return &NotSafeError{Keyset: step.Keyset, Message: fmt.Sprintf("it is not safe to %s %s after %s\n%s\nTo continue without them: %s.",
			step.Action, step.Keyset, formatDuration(o.Timeout), state, without)}
	case err != nil:
		return fmt.Errorf("wait for the agents before %s %s: %w", step.Action, step.Keyset, err)
	}
	return nil
}

// showBehind returns what to show of the agents that are behind.
func showBehind(s Status, step Step, begun time.Time, without string) *display {
	d := &display{
		step: step.Action, title: fmt.Sprintf("%s %s, when all agents have applied the trust bundle", step.Action, step.Keyset),
		line: behindText(s, step), begun: begun, holders: s.Behind, status: s,
		all: "keysetctl list -o json", notes: []string{"to continue without them: interrupt, then " + without},
	}
	if knowsBehind(s) {
		d.what, d.left, d.total = fmt.Sprintf("agents have not applied trust bundle %d", s.Sequence), s.AgentsBehind, s.Agents
	} else {
		d.notes = append([]string{d.line}, d.notes...)
	}
	return d
}

// behindText says how many agents are behind, or why that is not known.
func behindText(s Status, step Step) string {
	if knowsBehind(s) {
		return agentsBehind(s)
	}
	text := agentsBehindNotKnown
	if k, _ := find(s, step.Keyset); k.Unknown != "" {
		text += ": " + cli.Printable(k.Unknown)
	}
	return text
}

// describeBehind names the agents that are behind, for an error.
func describeBehind(s Status, step Step, now time.Time) string {
	lines := []string{behindText(s, step) + "."}
	lines = append(lines, nameBehind(s, now)...)
	if s.AgentsBehind > 0 {
		lines = append(lines, "Their workloads may not be able to verify the SVIDs of the new keyset.",
			"If a node is gone for good: "+s.EvictGone+".")
	}
	return strings.Join(lines, "\n")
}

// nameBehind has a line for each of the first agents that are behind, those that have
// been silent the longest first.
func nameBehind(s Status, now time.Time) []string {
	behind := slices.Clone(s.Behind)
	slices.SortFunc(behind, func(a, b Holder) int {
		return cmp.Or(a.LastReport.Compare(b.LastReport), cmp.Compare(a.Agent, b.Agent))
	})
	var lines []string
	for i, h := range behind {
		if i == maxNamedHolders {
			break
		}
		lines = append(lines, "  "+h.full()+": "+h.fact(0, moment{now, s.ServerStartedAt}))
	}
	if more := s.AgentsBehind - len(lines); more > 0 && len(lines) > 0 {
		lines = append(lines, fmt.Sprintf("  and %d more", more))
	}
	return lines
}
