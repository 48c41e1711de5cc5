package runbook

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// For is what is to be safe: removing a keyset's X.509 key, its JWT key, or both.
type For string

// The values of For.
const (
	X509 For = "x509"
	JWT  For = "jwt"
	All  For = "all"
)

const (
	// DefaultInterval is the time between two looks at the server.
	DefaultInterval = 2 * time.Second
	// pollTimeout bounds one look, so that a server that hangs is seen to.
	pollTimeout = 30 * time.Second
)

// WaitOptions say how to wait. The zero value waits without end for what
// [X509] means.
type WaitOptions struct {
	For      For
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

// Result is how a wait ended, and the whole of its JSON form. Of a wait that
// was not successful it is what was last known.
type Result struct {
	Keyset string `json:"keyset"`
	For    For    `json:"for"`
	Safe   bool   `json:"safe"`
	// Removed: somebody removed the keyset meanwhile.
	Removed   bool      `json:"removed"`
	Waited    float64   `json:"waited_seconds"`
	X509SVIDs int       `json:"x509_svids"` // left; negative: not known
	Holders   []Holder  `json:"holders"`
	JWTExpiry time.Time `json:"jwt_latest_expiry,omitzero"`
	Unknown   string    `json:"unknown,omitempty"`
	// Estimated is when X.509 is expected to be done; zero when it is or when
	// nobody can say.
	Estimated time.Time `json:"estimated_end,omitzero"`
	// Remarks are sentences for the operator.
	Remarks []string `json:"remarks,omitempty"`
}

// String is the last line of a successful wait.
func (r Result) String() string {
	if r.Removed {
		return fmt.Sprintf("Keyset %s has been removed meanwhile.", r.Keyset)
	}
	what := map[For]string{X509: "", JWT: " for JWT-SVIDs", All: " for X.509-SVIDs and JWT-SVIDs"}[r.For]
	return fmt.Sprintf("Keyset %s is safe to remove%s.", r.Keyset, what)
}

// Wait returns when the tainted keyset is safe to remove, or with a
// [NotSafeError] when it is not within the timeout. Only an answer of the
// server that says so is safe: a look that fails is shown and made again, and
// figures that are not known are waited for. The first look must succeed.
//
// A keyset that is not tainted is an error. One that is not there is an error
// too, because a mistyped ID is no proof of anything; one that disappears
// during the wait was removed, and that ends it without an error.
func Wait(ctx context.Context, b Backend, id string, o WaitOptions) (Result, error) {
	o = o.withDefaults()
	r := Result{Keyset: id, For: o.For, X509SVIDs: -1, Holders: []Holder{}}
	begun := o.Now()
	var k Keyset
	seen := false
	look := func(ctx context.Context) (done bool, line string, err error) {
		s, err := b.Status(ctx)
		if err != nil {
			return false, "", err
		}
		next, found := find(s, id)
		if !found {
			if !seen {
				return false, "", final{fmt.Errorf("there is no keyset %s: it was removed already, or the ID is mistyped; run keysetctl list", id)}
			}
			r.Removed = true
			return true, "", nil
		}
		k, seen = next, true
		if err := k.waitable(o.For); err != nil {
			return false, "", final{err}
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
	err := await(ctx, o, id, look)
	r.Waited = o.Now().Sub(begun).Seconds()
	switch {
	case errors.Is(err, errTimeout):
		return r, &NotSafeError{Keyset: id, Message: timedOut(k, r, o)}
	case err != nil:
		return r, fmt.Errorf("wait for keyset %s: %w", id, err)
	}
	if text := k.jwtRemark(o.Now()); r.Safe && o.For == X509 && text != "" {
		r.Remarks = append(r.Remarks, text)
	}
	return r, nil
}

// waitable refuses to wait for what will not come by itself.
func (k Keyset) waitable(f For) error {
	of := []For{f}
	if f == All {
		of = []For{X509, JWT}
	}
	for _, f := range of {
		switch state := k.state(f); state {
		case Tainted:
		case Active:
			return fmt.Errorf("it is Active and signs: activate a successor, then taint %s", k.ID)
		default:
			return fmt.Errorf("it is %s, so nothing replaces what it signed: taint %s first", state, k.ID)
		}
	}
	return nil
}

// progress is the line that is shown while the keyset is waited for.
func (k Keyset) progress(f For, holders []Holder, now time.Time) string {
	var parts []string
	if f != JWT && !k.safe(X509) {
		switch {
		case k.Unknown != "":
			parts = append(parts, "X.509-SVIDs left not known: "+k.Unknown)
		case k.X509SVIDs < 0:
			parts = append(parts, "X.509-SVIDs left not known")
		default:
			parts = append(parts, left(k, holders, "left"))
		}
		switch end, reason := estimate(holders, now); {
		case end.IsZero():
		case reason == reasonSilent || reason == reasonRestored:
			parts[0] += ", done in " + short(end.Sub(now)) + " at the latest"
		default:
			parts[0] += ", done in about " + short(end.Sub(now))
		}
		if len(holders) > 0 {
			parts = append(parts, names(holders, now))
		}
	}
	if f != X509 && !k.safe(JWT) {
		switch {
		case k.JWTExpiry.After(now):
			parts = append(parts, "JWT-SVIDs valid until "+when(k.JWTExpiry, now))
		case k.jwtJustExpired(now):
			parts = append(parts, "JWT-SVIDs expired "+when(k.JWTExpiry, now)+", but not by all clocks")
		default:
			parts = append(parts, "end of JWT-SVIDs not known")
		}
	}
	return k.ID + ": " + strings.Join(parts, "; ")
}

// names lists the first few agents in a few words each.
func names(holders []Holder, now time.Time) string {
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

// timedOut is the message of a wait that took too long.
func timedOut(k Keyset, r Result, o WaitOptions) string {
	now := o.Now()
	text := fmt.Sprintf("keyset %s is not safe to remove after %s", r.Keyset, short(o.Timeout))
	if k.ID == "" {
		return text + "\nThe server has not answered."
	}
	if o.For != JWT && !k.safe(X509) {
		text += "\n" + hanging(k, r.Holders, nil, now)
	}
	if jwt := k.jwtRemark(now); o.For != X509 && jwt != "" {
		text += "\n" + jwt
	}
	return text + fmt.Sprintf("\nRun keysetctl wait %s again, and look after the agents that are silent or behind.", r.Keyset)
}

// errTimeout ends an await whose time is over.
var errTimeout = errors.New("the time is over")

// final is an error that looking again does not mend.
type final struct{ error }

func (f final) Unwrap() error { return f.error }

// await looks every interval until the look says that it is done. A look that
// fails is shown and made again, except the first and one that is final.
func await(ctx context.Context, o WaitOptions, what string, look func(context.Context) (done bool, line string, err error)) error {
	defer o.Progress.Clear()
	if o.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, o.Timeout, errTimeout)
		defer cancel()
	}
	for first := true; ; first = false {
		lookCtx, cancel := context.WithTimeout(ctx, pollTimeout)
		done, line, err := look(lookCtx)
		cancel()
		if f, ok := errors.AsType[final](err); ok {
			return f.error
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
			o.Progress.Progress("failed", fmt.Sprintf("%s: no answer, trying again: %v", what, err), o.Now())
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
