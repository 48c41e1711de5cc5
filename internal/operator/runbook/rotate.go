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

// The actions. ActNone means that only the active keyset is left.
const (
	ActNone     Action = ""
	ActPrepare  Action = "prepare"
	ActActivate Action = "activate"
	ActTaint    Action = "taint"
	ActRemove   Action = "remove"
)

// Step is an action and its keyset.
type Step struct {
	Action Action
	Keyset string // empty for ActNone and ActPrepare
}

// Next decides from the state alone what a rotation does next. A rotation ends when
// only the active keyset is left. The first row that fits decides:
//
//	Tainted  to retire  to activate   next step
//	1        any        any           wait until it is safe, remove it
//	2 or more           any           the chosen one, else an error that names them
//	0        1          any           taint it
//	0        2 or more  any           the chosen one, else an error that names them
//	0        0          1             activate it
//	0        0          2 or more     the chosen one, else an error that names them
//	0        0          0             none: the rotation is complete, or has not begun
//
// A Prepared keyset is to be retired if it has signed before, is older than the active
// keyset or has expired. Every other Prepared keyset is to be activated.
//
// Next fails unless exactly one keyset is active and every keyset has both keys in
// the same state.
func Next(s Status, chosen string, now time.Time) (Step, error) {
	active := -1
	for i, k := range s.Keysets {
		switch {
		case k.JWTState != "" && k.JWTState != k.State:
			return Step{}, fmt.Errorf("%s: complete the step with activate, taint or remove, then run keysetctl rotate again", keyStatesDiffer(k))
		case k.X509AuthorityID == "" || k.JWTKeyID == "":
			return Step{}, fmt.Errorf("keyset %s lacks one of its two keys: replace it with prepare, activate, taint and remove, then run keysetctl rotate again", k.ID)
		case k.State == Active && active >= 0:
			return Step{}, fmt.Errorf("two keysets are active, %s and %s: check the server", s.Keysets[active].ID, k.ID)
		case k.State == Active:
			active = i
		}
	}
	if active < 0 {
		return Step{}, errors.New("no keyset is active: activate one, then run keysetctl rotate again")
	}
	var tainted, old, prepared []string
	for i, k := range s.Keysets {
		expired := !k.ExpiresAt.IsZero() && !now.Before(k.ExpiresAt)
		switch {
		case k.State == Tainted:
			tainted = append(tainted, k.ID)
		case k.State != Prepared:
		case k.SteppedDown || i < active || expired:
			old = append(old, k.ID)
		default:
			prepared = append(prepared, k.ID)
		}
	}
	switch {
	case len(tainted) > 0:
		return choose(ActRemove, tainted, chosen)
	case len(old) > 0:
		return choose(ActTaint, old, chosen)
	case len(prepared) > 0:
		return choose(ActActivate, prepared, chosen)
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
	return Step{}, fmt.Errorf("the next step is to %s one of %s: choose one with --keyset ID", a, joinWithAnd(ids))
}

// RotateOptions are the options of [Rotate]. Wait.For must not be JWT, because removal
// must be safe for X.509-SVIDs. Wait.Timeout limits each wait.
type RotateOptions struct {
	Wait WaitOptions
	// Keyset chooses between several keysets for the next step; it may be empty.
	Keyset string
	// Ask is called before each step; nil means yes.
	Ask func(question string) (bool, error)
	// Report is called after each step; nil: no calls.
	Report func(StepResult)
}

// Rotation is the result of [Rotate], and its JSON output.
type Rotation struct {
	Steps    []StepResult `json:"steps"`
	Complete bool         `json:"complete"`
	Active   string       `json:"active"` // the keyset that signs; empty when not known
}

// errDeclined ends a rotation after the answer no.
var errDeclined = errors.New("stopped before this step; run keysetctl rotate again to continue")

// Rotate takes the steps that [Next] decides until only the active keyset is left. If
// it finds only that one, it prepares another first. Before it activates or taints
// it waits until all agents have applied the trust bundle, and before it removes
// until that is safe. It stores nothing: after an interruption or an error the next
// Rotate continues from the state that it finds. It stops at the first step that
// fails or whose outcome is not known.
func Rotate(ctx context.Context, b Backend, o RotateOptions) (Rotation, error) {
	o.Wait = o.Wait.withDefaults()
	if o.Report == nil {
		o.Report = func(StepResult) {}
	}
	r := Rotation{Steps: []StepResult{}}
	var waited Step  // the step whose preconditions hold
	var last Action  // the last completed one
	started := false // a step was found or completed
	for {
		s, err := status(ctx, b)
		if err != nil {
			return r, err
		}
		r.Active = activeID(s)
		if err := checkChosen(s, o.Keyset); err != nil && !started {
			return r, err
		}
		if err := checkKnowable(s); err != nil {
			return r, err
		}
		step, err := Next(s, o.Keyset, o.Wait.Now())
		if err != nil {
			return r, err
		}
		switch {
		case step.Action != ActNone:
		case !started:
			step.Action = ActPrepare
		case last == ActPrepare:
			return r, fmt.Errorf("keyset %s was removed by somebody else; run keysetctl list", r.Steps[len(r.Steps)-1].Keyset)
		default:
			r.Complete = true
			return r, nil
		}
		if step.Action != ActPrepare && step != waited {
			started = true
			if err := awaitPreconditions(ctx, b, step, o.Wait); err != nil {
				return r, err
			}
			waited = step
			continue // the state may have changed during the wait
		}
		if err := confirm(o, step, s); err != nil {
			return r, err
		}
		done, err := perform(ctx, b, step, o.Wait.Now())
		if errors.Is(err, ErrOutcomeUnknown) {
			err = fmt.Errorf("%s %s: %w", step.Action, step.Keyset, err)
		}
		if err != nil {
			return r, err
		}
		r.Steps = append(r.Steps, done)
		o.Report(done)
		last, waited, started = step.Action, Step{}, true
		// The rotation continues with the keysets of its own steps.
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

// checkChosen returns an error if no step can be about the keyset.
func checkChosen(s Status, id string) error {
	if id == "" {
		return nil
	}
	k, found := find(s, id)
	switch {
	case !found:
		return fmt.Errorf("--keyset %s: there is no such keyset; run keysetctl list", id)
	case k.State == Active:
		return fmt.Errorf("--keyset %s: it is active; choose one to activate, taint or remove", id)
	}
	return nil
}

// checkKnowable returns a [NotSafeError] if no wait of the rotation could end.
func checkKnowable(s Status) error {
	for _, k := range s.Keysets {
		if k.Unknowable {
			return &NotSafeError{Keyset: k.ID, Message: "keysetctl rotate cannot know when its steps are safe: " + cli.Printable(k.Unknown)}
		}
	}
	return nil
}

func awaitPreconditions(ctx context.Context, b Backend, step Step, o WaitOptions) error {
	switch step.Action {
	case ActActivate, ActTaint:
		return awaitBundleApplied(ctx, b, step, o, fmt.Sprintf("keysetctl %s %s --force, then keysetctl rotate again", step.Action, step.Keyset))
	case ActRemove:
		o.Progress.Line(fmt.Sprintf("Waiting until %s is safe to remove.", step.Keyset))
		r, err := Wait(ctx, b, step.Keyset, o)
		if text := r.Summary(); err == nil && text != "" {
			o.Progress.Line(text)
		}
		return err
	}
	return nil
}

// confirm asks the operator before a step.
func confirm(o RotateOptions, step Step, s Status) error {
	if o.Ask == nil {
		return nil
	}
	k, _ := find(s, step.Keyset)
	var question string
	switch step.Action {
	case ActPrepare:
		question = "Prepare a new keyset? It is published, but does not sign."
	case ActActivate:
		question = fmt.Sprintf("Activate %s? It then signs instead of %s.", k.ID, activeID(s))
	case ActTaint:
		question = fmt.Sprintf("Taint %s? Agents replace the X.509-SVIDs that it signed.", k.ID)
	case ActRemove:
		question = fmt.Sprintf("Remove %s? This cannot be undone.", k.ID)
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

func perform(ctx context.Context, b Backend, step Step, now time.Time) (StepResult, error) {
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
