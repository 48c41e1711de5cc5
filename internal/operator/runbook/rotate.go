package runbook

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/renewd/renewd/internal/cli"
)

// Action is a step of a rotation.
type Action string

// The actions. ActNone: one keyset is left, and it is active.
const (
	ActNone     Action = ""
	ActPrepare  Action = "prepare"
	ActActivate Action = "activate"
	ActTaint    Action = "taint"
	ActRemove   Action = "remove"
)

// Step is what a rotation does next.
type Step struct {
	Action Action
	Keyset string // empty for ActNone and ActPrepare
}

// Next decides from the state alone what a rotation does next. Its goal is
// that one keyset is left, and active; the first row that fits decides:
//
//	Tainted  to retire  to activate   next step
//	1        any        any           wait until it is safe, remove it
//	2 or more           any           the one chosen of them, else an error that names them
//	0        1          any           taint it
//	0        2 or more  any           the one chosen of them, else an error that names them
//	0        0          1             activate it
//	0        0          2 or more     the one chosen of them, else an error that names them
//	0        0          0             none: the rotation is complete, or has not begun
//
// To retire is what is Prepared and has signed before, is older than the
// active keyset, or has expired; to activate is every other that is Prepared.
// What was begun is finished first, so that there are never more keysets to
// be told apart than necessary.
//
// Unless exactly one keyset is active, and both keys of every keyset are there
// and in the same state, Next is an error: this is no state that a rotation
// passes through.
func Next(s Status, chosen string, now time.Time) (Step, error) {
	active := -1
	for i, k := range s.Keysets {
		switch {
		case k.JWTState != "" && k.JWTState != k.State:
			return Step{}, fmt.Errorf("%s: carry out the step that is missing with activate, taint or remove, then run keysetctl rotate again", apart(k))
		case k.X509AuthorityID == "" || k.JWTKeyID == "":
			return Step{}, fmt.Errorf("keyset %s lacks one of its two keys: replace it with prepare, activate, taint and remove, then run keysetctl rotate again", k.ID)
		case k.State == Active && active >= 0:
			return Step{}, fmt.Errorf("two keysets are active, %s and %s: this must not be, look at the server", s.Keysets[active].ID, k.ID)
		case k.State == Active:
			active = i
		}
	}
	if active < 0 {
		return Step{}, errors.New("no keyset is active: activate one, then run keysetctl rotate again")
	}
	var tainted, old, fresh []string
	for i, k := range s.Keysets {
		expired := !k.ExpiresAt.IsZero() && !now.Before(k.ExpiresAt)
		switch {
		case k.State == Tainted:
			tainted = append(tainted, k.ID)
		case k.State != Prepared:
		case k.SteppedDown || i < active || expired:
			old = append(old, k.ID)
		default:
			fresh = append(fresh, k.ID)
		}
	}
	switch {
	case len(tainted) > 0:
		return choose(ActRemove, tainted, chosen)
	case len(old) > 0:
		return choose(ActTaint, old, chosen)
	case len(fresh) > 0:
		return choose(ActActivate, fresh, chosen)
	}
	return Step{}, nil
}

func choose(a Action, ids []string, chosen string) (Step, error) {
	if len(ids) == 1 {
		return Step{a, ids[0]}, nil
	}
	for _, id := range ids {
		if id == chosen {
			return Step{a, id}, nil
		}
	}
	return Step{}, fmt.Errorf("the next step is to %s one of %s: say which with --keyset ID", a, and(ids))
}

// RotateOptions say how to walk through a rotation. Wait.For must not be JWT:
// nothing can be removed that is not safe for X.509-SVIDs. Wait.Timeout bounds
// each of the waits.
type RotateOptions struct {
	Wait WaitOptions
	// Keyset is the one that is meant where several could be; else empty.
	Keyset string
	// Ask is asked before each step; nil means yes.
	Ask func(question string) (bool, error)
	// Report is told of each step when it is done; nil: nobody is.
	Report func(Done)
}

// Rotation is how a rotation went, and the whole of its JSON form.
type Rotation struct {
	Steps    []Done `json:"steps"`
	Complete bool   `json:"complete"`
	Active   string `json:"active"` // the keyset that signs; empty when not known
}

// errDeclined ends a rotation at a question that was answered with no.
var errDeclined = errors.New("stopped as asked, nothing was changed by this step; run keysetctl rotate again to go on from here")

// Rotate walks from whatever state the deployment is in to the end of a
// rotation, as [Next] decides; where only one keyset is left, it prepares the
// next one first. Before activating and tainting it waits until all agents
// have applied the trust bundle, before removing until that is safe. It keeps
// nothing: after an interruption, or an error, the next Rotate goes on from
// the state that it finds. It stops at the first step that fails or whose
// outcome is not known.
func Rotate(ctx context.Context, b Backend, o RotateOptions) (Rotation, error) {
	o.Wait = o.Wait.withDefaults()
	if o.Report == nil {
		o.Report = func(Done) {}
	}
	r := Rotation{Steps: []Done{}}
	var waited Step // the step whose facts have been waited for
	var last Action // that was carried out
	begun := false  // there was something to finish, or last is set
	for {
		s, err := status(ctx, b)
		if err != nil {
			return r, err
		}
		r.Active = activeID(s)
		if err := checkChosen(s, o.Keyset); err != nil && !begun {
			return r, err
		}
		step, err := Next(s, o.Keyset, o.Wait.Now())
		if err != nil {
			return r, err
		}
		switch {
		case step.Action != ActNone:
		case !begun:
			step.Action = ActPrepare
		case last == ActPrepare:
			return r, fmt.Errorf("keyset %s is not there any more: somebody else is at work; run keysetctl list", r.Steps[len(r.Steps)-1].Keyset)
		default:
			r.Complete = true
			return r, nil
		}
		if step.Action != ActPrepare && step != waited {
			begun = true
			if err := gate(ctx, b, step, o.Wait); err != nil {
				return r, err
			}
			waited = step
			continue // the world may be another after a wait
		}
		if err := ask(o, step, s); err != nil {
			return r, err
		}
		done, err := carryOut(ctx, b, step, o.Wait.Now())
		if errors.Is(err, ErrOutcomeUnknown) {
			err = fmt.Errorf("%s %s: %w", step.Action, step.Keyset, err)
		}
		if err != nil {
			return r, err
		}
		r.Steps = append(r.Steps, done)
		o.Report(done)
		last, waited, begun = step.Action, Step{}, true
		// What this rotation has touched itself is what it goes on with.
		switch step.Action {
		case ActPrepare:
			o.Keyset = done.Keyset
		case ActActivate:
			o.Keyset = r.Active
		}
	}
}

func status(ctx context.Context, b Backend) (Status, error) {
	ctx, cancel := context.WithTimeout(ctx, pollTimeout)
	defer cancel()
	s, err := b.Status(ctx)
	if err != nil {
		return Status{}, fmt.Errorf("read the state: %w", err)
	}
	return s, nil
}

func activeID(s Status) string {
	for _, k := range s.Keysets {
		if k.State == Active {
			return k.ID
		}
	}
	return ""
}

// checkChosen refuses an ID that could never be meant.
func checkChosen(s Status, id string) error {
	if id == "" {
		return nil
	}
	k, found := find(s, id)
	switch {
	case !found:
		return fmt.Errorf("--keyset %s: there is no such keyset; run keysetctl list", id)
	case k.State == Active:
		return fmt.Errorf("--keyset %s: it is active; name one that is to be activated, tainted or removed", id)
	}
	return nil
}

// gate waits for the facts that a step depends on.
func gate(ctx context.Context, b Backend, step Step, o WaitOptions) error {
	switch step.Action {
	case ActActivate, ActTaint:
		return applied(ctx, b, step, o)
	case ActRemove:
		o.Progress.Line(fmt.Sprintf("Waiting until %s is safe to remove.", step.Keyset))
		_, err := Wait(ctx, b, step.Keyset, o)
		return err
	}
	return nil
}

// applied waits until every agent has applied the trust bundle. An agent that
// has not would leave its workloads unable to verify what the new keyset
// signs.
func applied(ctx context.Context, b Backend, step Step, o WaitOptions) error {
	announced := false
	state := "The server has not answered"
	err := await(ctx, o, step.Keyset, func(ctx context.Context) (bool, string, error) {
		s, err := b.Status(ctx)
		if err != nil {
			return false, "", err
		}
		if s.Agents >= 0 && s.AgentsBehind == 0 {
			return true, "", nil
		}
		if !announced {
			announced = true
			o.Progress.Line(fmt.Sprintf("Waiting until all agents have applied the trust bundle. (To go on without: interrupt, run keysetctl %s %s, then keysetctl rotate again.)", step.Action, step.Keyset))
		}
		if state = notKnownBehind; s.Agents >= 0 && s.AgentsBehind > 0 {
			state = behind(s)
		} else if k, _ := find(s, step.Keyset); k.Unknown != "" {
			state += ": " + cli.Printable(k.Unknown)
		}
		return false, state, nil
	})
	switch {
	case errors.Is(err, errTimeout):
		return &NotSafeError{Keyset: step.Keyset, Message: fmt.Sprintf(
			"it is not safe to %s %s after %s\n%s.\nRun keysetctl rotate again to go on waiting, or keysetctl %s %s to go on without them.",
			step.Action, step.Keyset, short(o.Timeout), state, step.Action, step.Keyset)}
	case err != nil:
		return fmt.Errorf("wait for the agents before %s %s: %w", step.Action, step.Keyset, err)
	}
	return nil
}

// ask puts the question that stands before a step.
func ask(o RotateOptions, step Step, s Status) error {
	if o.Ask == nil {
		return nil
	}
	k, _ := find(s, step.Keyset)
	var question string
	switch step.Action {
	case ActPrepare:
		question = "Prepare a new keyset? It is published and does not sign yet."
	case ActActivate:
		question = fmt.Sprintf("Activate %s? It signs from then on, and %s steps down.", k.ID, activeID(s))
	case ActTaint:
		question = fmt.Sprintf("Taint %s? Agents replace the X.509-SVIDs that it signed.", k.ID)
	case ActRemove:
		question = fmt.Sprintf("Remove %s? This is permanent.", k.ID)
		if text := k.jwtRemark(o.Wait.Now()); text != "" {
			question = text + "\n" + question
		}
	}
	yes, err := o.Ask(question)
	if err != nil {
		return fmt.Errorf("ask before %s: %w", step.Action, err)
	}
	if !yes {
		return errDeclined
	}
	return nil
}

func carryOut(ctx context.Context, b Backend, step Step, now time.Time) (Done, error) {
	switch step.Action {
	case ActPrepare:
		return Prepare(ctx, b)
	case ActActivate:
		return Activate(ctx, b, step.Keyset)
	case ActTaint:
		return Taint(ctx, b, step.Keyset)
	}
	return Remove(ctx, b, step.Keyset, false, now)
}
