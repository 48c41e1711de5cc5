package runbook

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// mutationTimeout limits a mutation. It is longer than the server's own limit of
// 120 seconds, so that the server's error arrives first.
const mutationTimeout = 130 * time.Second

// StepResult is the result of a completed step, and its JSON output.
type StepResult struct {
	Keyset string `json:"keyset"`
	Done   string `json:"done"` // prepared, activated, tainted, removed
	// Remarks are sentences for the operator.
	Remarks []string `json:"remarks,omitempty"`
}

// String returns the line that a step prints.
func (d StepResult) String() string { return fmt.Sprintf("Keyset %s %s.", d.Keyset, d.Done) }

// Prepare makes a new keyset. Like every step it calls the server once and returns
// the server's error unchanged; [Remedy] explains it.
func Prepare(ctx context.Context, b Backend) (StepResult, error) {
	ctx, cancel := context.WithTimeout(ctx, mutationTimeout)
	defer cancel()
	k, err := b.Prepare(ctx)
	return StepResult{Keyset: k.ID, Done: "prepared"}, markUnknownOutcome(err)
}

// Activate makes a prepared keyset the signing one.
func Activate(ctx context.Context, b Backend, id string) (StepResult, error) {
	ctx, cancel := context.WithTimeout(ctx, mutationTimeout)
	defer cancel()
	return StepResult{Keyset: id, Done: "activated"}, markUnknownOutcome(b.Activate(ctx, id))
}

// Taint starts the replacement of everything that a prepared keyset signed.
func Taint(ctx context.Context, b Backend, id string) (StepResult, error) {
	ctx, cancel := context.WithTimeout(ctx, mutationTimeout)
	defer cancel()
	return StepResult{Keyset: id, Done: "tainted"}, markUnknownOutcome(b.Taint(ctx, id))
}

// Remove deletes a tainted keyset from the trust bundle. If that is not safe and
// force is not set, it returns a [NotSafeError] that names what still depends on the
// keyset and the remedy. Valid JWT-SVIDs do not make removal unsafe; the remarks
// mention them.
func Remove(ctx context.Context, b Backend, id string, force bool, now time.Time) (StepResult, error) {
	s, err := status(ctx, b)
	if err != nil {
		return StepResult{}, fmt.Errorf("nothing was changed: %w", err)
	}
	k, found := find(s, id)
	// The server has its own error for a keyset that is not tainted.
	if found && k.State == Tainted && !force && !k.safe(X509) {
		return StepResult{}, refuse(ctx, b, k, "", moment{now, s.ServerStartedAt})
	}
	removeCtx, cancel := context.WithTimeout(ctx, mutationTimeout)
	defer cancel()
	err = b.Remove(removeCtx, id, force)
	if notSafe, ok := errors.AsType[*NotSafeError](err); ok {
		k.ID = id
		return StepResult{}, refuse(ctx, b, k, notSafe.Message, moment{now, s.ServerStartedAt})
	}
	if err != nil {
		return StepResult{}, markUnknownOutcome(err)
	}
	d := StepResult{Keyset: id, Done: "removed"}
	if force && found && !k.safe(X509) {
		d.Remarks = append(d.Remarks, "Removal was forced. Workloads whose X.509-SVIDs it signed are rejected until they are renewed.")
	}
	if text := k.jwtRemark(now); found && text != "" {
		d.Remarks = append(d.Remarks, text)
	}
	d.Remarks = append(d.Remarks, freshBundle)
	return d, nil
}

// freshBundle reminds of what a node trusts that starts for the first time.
const freshBundle = `Nodes made with a trust bundle of before the rotation cannot verify the server: refresh it wherever nodes are made, with "server bundle" or "spire-server bundle show".`

// refuse returns a [NotSafeError] for a keyset. reason is the server's error; it may
// be empty.
func refuse(ctx context.Context, b Backend, k Keyset, reason string, at moment) error {
	text := fmt.Sprintf("cannot remove %s: it is not safe yet", k.ID)
	if reason != "" {
		text += " (" + reason + ")"
	}
	ctx, cancel := context.WithTimeout(ctx, pollTimeout)
	defer cancel()
	holders, err := b.Holders(ctx, k.ID)
	text += "\n" + describeDependents(k, holders, err, at)
	if jwt := k.jwtRemark(at.now); jwt != "" {
		text += "\n" + jwt
	}
	text += fmt.Sprintf("\nRun keysetctl wait %s, then remove it. With --force it is removed now, and the SVIDs that depend on it are rejected.", k.ID)
	return &NotSafeError{Keyset: k.ID, Message: text}
}
