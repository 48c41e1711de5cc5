package runbook

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/renewd/renewd/internal/cli"
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
	For Scope
	// Until is the percentage of the deployment's agents that is enough: the wait ends
	// when so many of them no longer depend on the X.509 key. Zero waits until the keyset
	// is safe to remove. It is only for [X509].
	Until    float64
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
	Removed bool `json:"removed"`
	// Until is the percentage of agents that was asked for, and Agents the number of them.
	// Reached says that so many do not depend on the keyset, although it is not safe.
	Until     float64   `json:"until,omitempty"`
	Agents    int       `json:"agents,omitempty"`
	Reached   bool      `json:"reached,omitempty"`
	Waited    float64   `json:"waited_seconds"`
	X509SVIDs int       `json:"x509_svids"` // left; negative: not known
	Holders   []Holder  `json:"holders"`
	JWTExpiry time.Time `json:"jwt_latest_expiry,omitzero"`
	Unknown   string    `json:"unknown,omitempty"`
	// Estimated is the expected end for the X.509 key. It is zero if that is safe or
	// there is no estimate.
	Estimated time.Time `json:"estimated_end,omitzero"`
	// Took is the time from the taint to the last replacement, and Planned what a plan for
	// the same fleet says, in seconds. They are zero if that is not known.
	Took    float64 `json:"wave_seconds,omitempty"`
	Planned float64 `json:"planned_seconds,omitempty"`
	// Remarks are sentences for the operator.
	Remarks []string `json:"remarks,omitempty"`
}

// Summary says how long the taint wave took, and how long it should have. It is empty if
// that is not known.
func (r Result) Summary() string {
	if r.Took <= 0 {
		return ""
	}
	text := "The wave took " + inSeconds(r.Took)
	if r.Planned > 0 {
		text += ", the plan said " + inSeconds(r.Planned)
	}
	return text + "."
}

func inSeconds(s float64) string { return formatDuration(time.Duration(s * float64(time.Second))) }

// String returns the line that a successful wait prints.
func (r Result) String() string {
	switch {
	case r.Removed:
		return fmt.Sprintf("Keyset %s was removed during the wait.", r.Keyset)
	case r.Reached && !r.Safe:
		free := r.Agents - holding(r.Holders)
		return fmt.Sprintf("%d of %s no longer %s on keyset %s.", free, quantity(r.Agents, "agent"), map[bool]string{true: "depends", false: "depend"}[free == 1], r.Keyset)
	}
	what := map[Scope]string{X509: "", JWT: " for JWT-SVIDs", All: " for X.509-SVIDs and JWT-SVIDs"}[r.For]
	return fmt.Sprintf("Keyset %s is safe to remove%s.", r.Keyset, what)
}

// wait is a wait in progress.
type wait struct {
	o       WaitOptions
	id      string
	started time.Time
	r       Result
	k       Keyset
	s       Status
	found   bool
	lastErr error // of a poll
	total   int   // the most SVIDs that were left
	most    map[string]int
	wave    *curve
}

// Wait returns when the tainted keyset is safe to remove, or with a [NotSafeError]
// after the timeout. Only an answer of the server ends the wait as safe: a failed
// poll is shown and repeated, and unknown figures are not safe. A [PermanentError] ends
// the wait, and figures that cannot become known end it with a [NotSafeError].
//
// Wait fails if the keyset is not tainted. It fails if the keyset does not exist at
// the first poll, because the ID may be mistyped. A keyset that is removed during the
// wait ends it without an error.
func Wait(ctx context.Context, b Backend, id string, o WaitOptions) (Result, error) {
	o = o.withDefaults()
	w := &wait{
		o: o, id: id, started: o.Now(), most: make(map[string]int),
		r: Result{Keyset: id, For: o.For, Until: o.Until, X509SVIDs: -1, Holders: []Holder{}},
	}
	err := await(ctx, o, id, func(ctx context.Context) (done bool, show *display, err error) {
		done, show, err = w.poll(ctx, b)
		if err != nil && ctx.Err() == nil {
			w.lastErr = err
		}
		return done, show, err
	})
	now := o.Now()
	w.r.Waited = now.Sub(w.started).Seconds()
	switch {
	case errors.Is(err, errTimeout):
		return w.r, &NotSafeError{Keyset: id, Message: w.timeoutMessage(now)}
	case err != nil:
		if _, notSafe := errors.AsType[*NotSafeError](err); notSafe {
			return w.r, err
		}
		return w.r, fmt.Errorf("wait for keyset %s: %w", id, err)
	}
	w.remark(now)
	return w.r, nil
}

// poll looks once. It returns whether the wait is over, and what to show until the next
// poll.
func (w *wait) poll(ctx context.Context, b Backend) (done bool, show *display, err error) {
	s, err := b.Status(ctx)
	if err != nil {
		return false, nil, err
	}
	next, exists := find(s, w.id)
	if !exists {
		if !w.found {
			return false, nil, &PermanentError{fmt.Errorf("there is no keyset %s: it was removed, or the ID is mistyped; run keysetctl list", w.id)}
		}
		w.r.Removed = true
		return true, nil, nil
	}
	first := !w.found
	w.s, w.k, w.found = s, next, true
	k, r := &w.k, &w.r
	if err := k.checkWaitable(w.o.For); err != nil {
		return false, nil, &PermanentError{err}
	}
	now := w.o.Now()
	r.X509SVIDs, r.JWTExpiry, r.Unknown = k.X509SVIDs, k.JWTExpiry, k.Unknown
	if k.Unknown != "" {
		r.X509SVIDs = -1
	}
	r.Holders, r.Estimated = []Holder{}, time.Time{}
	r.Safe = k.safe(w.o.For)
	if k.safe(X509) && w.wave != nil && r.Took == 0 {
		r.Took, r.Planned = now.Sub(w.wave.from).Seconds(), w.wave.planned.Seconds()
	}
	if r.Safe {
		return true, nil, nil
	}
	if k.Unknowable {
		return false, nil, &NotSafeError{Keyset: w.id, Message: fmt.Sprintf(
			"keysetctl wait %s cannot know when the keyset is safe to remove: %s", w.id, cli.Printable(k.Unknown))}
	}
	if !k.safe(X509) && w.o.For != JWT {
		holders, err := b.Holders(ctx, w.id)
		if err == nil && holders != nil {
			r.Holders = holders
		}
		r.Estimated, _ = estimate(r.Holders, now)
		w.total = max(w.total, r.X509SVIDs)
		for _, h := range r.Holders {
			w.most[h.Agent] = max(w.most[h.Agent], h.SVIDs)
		}
		if first {
			w.wave = newCurve(w.k, r.Holders, now)
		}
		w.wave.add(r.X509SVIDs, now)
		if err == nil && w.reached() {
			r.Reached = true
			return true, nil, nil
		}
	}
	return false, w.show(now), nil
}

// reached reports whether enough agents no longer depend on the keyset. It is false if
// it is not known how many do.
func (w *wait) reached() bool {
	r := &w.r
	if w.o.Until <= 0 || w.s.Agents < 0 || r.X509SVIDs < 0 {
		return false
	}
	for _, h := range r.Holders {
		if h.Reason == reasonRestored {
			return false
		}
	}
	held := holding(r.Holders)
	r.Agents = max(w.s.Agents, held)
	return r.Agents > 0 && float64(r.Agents-held)*100 >= w.o.Until*float64(r.Agents)
}

// holding counts the agents of holders; signatures in flight may be for one more.
func holding(holders []Holder) int { return len(holders) }

// show returns what to show of the last poll.
func (w *wait) show(now time.Time) *display {
	title := "wait until " + w.id + " is safe to remove"
	if w.o.Until > 0 {
		title = fmt.Sprintf("wait until %s of agents no longer depend on %s", percent(w.o.Until), w.id)
	}
	d := &display{
		step: actWait, title: title, line: w.k.progress(w.o.For, w.r.Holders, now), begun: w.started,
		holders: w.r.Holders, byEnd: true, most: w.most, status: w.s,
		all: "keysetctl wait " + w.id + " --timeout 1s -o json", curve: w.wave,
	}
	if w.o.For != JWT && !w.k.safe(X509) {
		d.what, d.left, d.total = "X.509-SVIDs left", w.r.X509SVIDs, w.total
		if w.k.Unknown != "" {
			d.notes = append(d.notes, w.k.Unknown)
		}
	}
	if w.o.For != X509 && !w.k.safe(JWT) {
		d.notes = append(d.notes, w.k.jwtProgress(now))
	}
	return d
}

// remark adds what the operator should know about the end of the wait.
func (w *wait) remark(now time.Time) {
	r := &w.r
	if r.Reached {
		r.Remarks = append(r.Remarks, describeDependents(w.k, r.Holders, nil, moment{now, w.s.ServerStartedAt}),
			fmt.Sprintf("To remove %s without them: keysetctl remove %s --force. Their SVIDs are rejected then.", r.Keyset, r.Keyset))
		return
	}
	if text := r.Summary(); r.Safe && text != "" {
		r.Remarks = append(r.Remarks, text)
	}
	if text := w.k.jwtRemark(now); r.Safe && w.o.For == X509 && text != "" {
		r.Remarks = append(r.Remarks, text)
	}
}

func percent(p float64) string { return strconv.FormatFloat(p, 'f', -1, 64) + " %" }

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
		if text := ending(holders, now); text != "" && text != noKnownEnd {
			parts[0] += ", " + text
		}
		if len(holders) > 0 {
			parts = append(parts, agentSummary(holders, now))
		}
	}
	if f != X509 && !k.safe(JWT) {
		parts = append(parts, k.jwtProgress(now))
	}
	return k.ID + ": " + strings.Join(parts, "; ")
}

// jwtProgress says until when JWT-SVIDs are valid.
func (k Keyset) jwtProgress(now time.Time) string {
	switch {
	case k.JWTExpiry.After(now):
		return "JWT-SVIDs valid until " + timeAndDistance(k.JWTExpiry, now)
	case k.jwtJustExpired(now):
		return "JWT-SVIDs expired " + timeAndDistance(k.JWTExpiry, now) + ", but clocks may differ"
	}
	return "expiry of JWT-SVIDs not known"
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

func (w *wait) timeoutMessage(now time.Time) string {
	text := fmt.Sprintf("keyset %s is not safe to remove after %s", w.id, formatDuration(w.o.Timeout))
	if !w.found {
		return text + "\n" + noAnswer(w.lastErr)
	}
	if w.o.For != JWT && !w.k.safe(X509) {
		text += "\n" + describeDependents(w.k, w.r.Holders, nil, moment{now, w.s.ServerStartedAt})
	}
	if jwt := w.k.jwtRemark(now); w.o.For != X509 && jwt != "" {
		text += "\n" + jwt
	}
	return text + fmt.Sprintf("\nCheck the agents that are silent or behind, and run keysetctl wait %s again.", w.id)
}

// noAnswer describes a server that never answered. err is that of the last poll, or nil.
func noAnswer(err error) string {
	if err == nil {
		return "The server has not answered."
	}
	return "The server has not answered: " + cli.Printable(err.Error())
}

// errTimeout is the cause of a wait that ended by its timeout.
var errTimeout = errors.New("timeout")

// await polls every interval until poll returns done. A failed poll is shown and
// repeated, also the first one, because the server may be restarting. A [PermanentError]
// and a [NotSafeError] are returned.
func await(ctx context.Context, o WaitOptions, keysetID string, poll func(context.Context) (done bool, show *display, err error)) error {
	defer o.Progress.Clear()
	if o.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, o.Timeout, errTimeout)
		defer cancel()
	}
	failing := &display{step: actWait, title: "wait for an answer of the server", begun: o.Now()}
	last := failing // what the last successful poll showed
	for {
		pollCtx, cancel := context.WithTimeout(ctx, pollTimeout)
		done, show, err := poll(pollCtx)
		cancel()
		if _, ok := errors.AsType[*PermanentError](err); ok {
			return err
		}
		if _, ok := errors.AsType[*NotSafeError](err); ok {
			return err
		}
		if done && err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		kind := "left"
		if err != nil {
			kind, show = "failed", last.failed(keysetID, err)
		} else {
			last = show
		}
		if err := o.pause(ctx, kind, show); err != nil {
			return err
		}
	}
}

// pause shows the display until the next poll.
func (o WaitOptions) pause(ctx context.Context, kind string, show *display) error {
	next := time.NewTimer(o.Interval)
	defer next.Stop()
	for first := true; ; first = false {
		var redraw <-chan time.Time
		if columns, rows, ok := o.Progress.size(); ok {
			o.Progress.draw(show.block(columns, rows, o.Progress.Plain, o.Now()), rows)
			redraw = time.After(redrawInterval)
		} else if first {
			o.Progress.Progress(kind, show.line, o.Now())
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-next.C:
			return nil
		case <-redraw:
		}
	}
}
