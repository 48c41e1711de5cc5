package runbook

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Scope names the keys of a keyset that must be safe to remove.
type Scope string

// The scopes.
const (
	X509 Scope = "x509"
	JWT  Scope = "jwt"
	All  Scope = "all"
)

const (
	// DefaultInterval is the time between two polls of the server.
	DefaultInterval = 2 * time.Second
	// pollTimeout limits one poll.
	pollTimeout = 30 * time.Second
)

// WaitOptions are the options of [Wait]. The zero value waits for [X509], without
// a limit.
type WaitOptions struct {
	For      Scope
	Timeout  time.Duration // zero: no limit
	Interval time.Duration // DefaultInterval when zero
	Progress *Screen       // nil: silent
	Now      func() time.Time
}

func (o WaitOptions) withDefaults() WaitOptions {
	if o.For == "" {
		o.For = X509
	}
	if o.Interval <= 0 {
		o.Interval = DefaultInterval
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	return o
}

// Result is the result of a wait, and its JSON output. If the wait failed, it holds
// the last known figures.
type Result struct {
	Keyset string `json:"keyset"`
	For    Scope  `json:"for"`
	Safe   bool   `json:"safe"`
	// Removed says that the keyset was removed during the wait.
	Removed   bool      `json:"removed"`
	Waited    float64   `json:"waited_seconds"`
	X509SVIDs int       `json:"x509_svids"` // left; negative: not known
	Holders   []Holder  `json:"holders"`
	JWTExpiry time.Time `json:"jwt_latest_expiry,omitzero"`
	Unknown   string    `json:"unknown,omitempty"`
	// Estimated is the expected end for the X.509 key. It is zero if that is safe or
	// there is no estimate.
	Estimated time.Time `json:"estimated_end,omitzero"`
	// Remarks are sentences for the operator.
	Remarks []string `json:"remarks,omitempty"`
}

// String returns the line that a successful wait prints.
func (r Result) String() string {
	if r.Removed {
		return fmt.Sprintf("Keyset %s was removed during the wait.", r.Keyset)
	}
	what := map[Scope]string{X509: "", JWT: " for JWT-SVIDs", All: " for X.509-SVIDs and JWT-SVIDs"}[r.For]
	return fmt.Sprintf("Keyset %s is safe to remove%s.", r.Keyset, what)
}

// Wait returns when the tainted keyset is safe to remove, or with a [NotSafeError]
// after the timeout. Only an answer of the server ends the wait as safe: a failed
// poll is shown and repeated, and unknown figures are not safe. If the first poll
// fails, Wait returns its error.
//
// Wait fails if the keyset is not tainted. It fails if the keyset does not exist at
// the first poll, because the ID may be mistyped. A keyset that is removed during the
// wait ends it without an error.
func Wait(ctx context.Context, b Backend, id string, o WaitOptions) (Result, error) {
	o = o.withDefaults()
	r := Result{Keyset: id, For: o.For, X509SVIDs: -1, Holders: []Holder{}}
	started := o.Now()
	var k Keyset
	found := false
	poll := func(ctx context.Context) (done bool, line string, err error) {
		s, err := b.Status(ctx)
		if err != nil {
			return false, "", err
		}
		next, exists := find(s, id)
		if !exists {
			if i := slices.IndexFunc(s.Unowned, func(a Authority) bool { return a.Matches(id) }); i >= 0 {
				return false, "", permanentError{fmt.Errorf("no server has it any more, but it stays in the trust bundle: %s", s.Unowned[i])}
			}
			if !found {
				return false, "", permanentError{fmt.Errorf("there is no keyset %s: it was removed, or the ID is mistyped; run keysetctl list", id)}
			}
			r.Removed = true
			return true, "", nil
		}
		k, found = next, true
		if err := k.checkWaitable(o.For); err != nil {
			return false, "", permanentError{err}
		}
		now := o.Now()
		r.X509SVIDs, r.JWTExpiry, r.Unknown = k.X509SVIDs, k.JWTExpiry, k.Unknown
		if k.Unknown != "" {
			r.X509SVIDs = -1
		}
		r.Holders, r.Estimated = []Holder{}, time.Time{}
		if r.Safe = k.safe(o.For); r.Safe {
			return true, "", nil
		}
		if !k.safe(X509) && o.For != JWT {
			holders, err := b.Holders(ctx, id)
			if err == nil && holders != nil {
				r.Holders = holders
			}
			r.Estimated, _ = estimate(r.Holders, now)
		}
		return false, k.progress(o.For, r.Holders, now), nil
	}
	err := await(ctx, o, id, poll)
	r.Waited = o.Now().Sub(started).Seconds()
	switch {
	case errors.Is(err, errTimeout):
		return r, &NotSafeError{Keyset: id, Message: timeoutMessage(k, r, o)}
	case err != nil:
		return r, fmt.Errorf("wait for keyset %s: %w", id, err)
	}
	if text := k.jwtRemark(o.Now()); r.Safe && o.For == X509 && text != "" {
		r.Remarks = append(r.Remarks, text)
	}
	return r, nil
}

// checkWaitable returns an error unless the keys of the scope are tainted.
func (k Keyset) checkWaitable(scope Scope) error {
	keys := []Scope{scope}
	if scope == All {
		keys = []Scope{X509, JWT}
	}
	for _, f := range keys {
		switch state := k.state(f); state {
		case Tainted:
		case Active:
			return fmt.Errorf("it is Active: activate another keyset, then taint %s", k.ID)
		default:
			return fmt.Errorf("it is %s, and agents keep what it signed: run keysetctl taint %s", state, k.ID)
		}
	}
	return nil
}

// progress returns the progress line of a wait.
func (k Keyset) progress(f Scope, holders []Holder, now time.Time) string {
	var parts []string
	if f != JWT && !k.safe(X509) {
		switch {
		case k.Unknown != "":
			parts = append(parts, "X.509-SVIDs left not known: "+k.Unknown)
		case k.X509SVIDs < 0:
			parts = append(parts, "X.509-SVIDs left not known")
		default:
			parts = append(parts, remaining(k, holders)+" left")
		}
		switch end, reason := estimate(holders, now); {
		case end.IsZero():
		case reason == reasonSilent || reason == reasonRestored || reason == reasonSettling:
			parts[0] += ", done in " + formatDuration(end.Sub(now)) + " at the latest"
		default:
			parts[0] += ", done in about " + formatDuration(end.Sub(now))
		}
		if len(holders) > 0 {
			parts = append(parts, agentSummary(holders, now))
		}
	}
	if f != X509 && !k.safe(JWT) {
		switch {
		case k.JWTExpiry.After(now):
			parts = append(parts, "JWT-SVIDs valid until "+timeAndDistance(k.JWTExpiry, now))
		case k.jwtJustExpired(now):
			parts = append(parts, "JWT-SVIDs expired "+timeAndDistance(k.JWTExpiry, now)+", but clocks may differ")
		default:
			parts = append(parts, "expiry of JWT-SVIDs not known")
		}
	}
	return k.ID + ": " + strings.Join(parts, "; ")
}

// agentSummary names the first agents and counts the others.
func agentSummary(holders []Holder, now time.Time) string {
	const few = 3
	var list []string
	for i, h := range byEnd(holders, now) {
		if i == few {
			list = append(list, fmt.Sprintf("and %d more", len(holders)-i))
			break
		}
		list = append(list, h.name())
	}
	return strings.Join(list, ", ")
}

func timeoutMessage(k Keyset, r Result, o WaitOptions) string {
	now := o.Now()
	text := fmt.Sprintf("keyset %s is not safe to remove after %s", r.Keyset, formatDuration(o.Timeout))
	if k.ID == "" {
		return text + "\nThe server has not answered."
	}
	if o.For != JWT && !k.safe(X509) {
		text += "\n" + describeDependents(k, r.Holders, nil, now)
	}
	if jwt := k.jwtRemark(now); o.For != X509 && jwt != "" {
		text += "\n" + jwt
	}
	return text + fmt.Sprintf("\nCheck the agents that are silent or behind, and run keysetctl wait %s again.", r.Keyset)
}

// errTimeout is the cause of a wait that ended by its timeout.
var errTimeout = errors.New("timeout")

// permanentError is the error of a poll that is not worth another one.
type permanentError struct{ error }

func (e permanentError) Unwrap() error { return e.error }

// await polls every interval until poll returns done. A failed poll is shown and
// repeated; the first one's error and a permanentError are returned.
func await(ctx context.Context, o WaitOptions, keysetID string, poll func(context.Context) (done bool, line string, err error)) error {
	defer o.Progress.Clear()
	if o.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, o.Timeout, errTimeout)
		defer cancel()
	}
	for first := true; ; first = false {
		pollCtx, cancel := context.WithTimeout(ctx, pollTimeout)
		done, line, err := poll(pollCtx)
		cancel()
		if permanent, ok := errors.AsType[permanentError](err); ok {
			return permanent.error
		}
		if done && err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil && first {
			return err
		}
		if err != nil {
			o.Progress.Progress("failed", fmt.Sprintf("%s: no answer, retrying: %v", keysetID, err), o.Now())
		} else {
			o.Progress.Progress("left", line, o.Now())
		}
		timer := time.NewTimer(o.Interval)
		select {
		case <-ctx.Done():
			timer.Stop()
			return context.Cause(ctx)
		case <-timer.C:
		}
	}
}
