package runbook

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// mutationTimeout is how long the server's answer to a mutation is waited for:
// somewhat longer than the 120 seconds after which it gives up itself, so that
// it is the server who says so.
const mutationTimeout = 130 * time.Second

// Done is one step that was carried out, and the whole of its JSON form.
type Done struct {
	Keyset string `json:"keyset"`
	Done   string `json:"done"` // prepared, activated, tainted, removed
	// Remarks are sentences for the operator.
	Remarks []string `json:"remarks,omitempty"`
}

// String is the line that the runbook shows.
func (d Done) String() string { return fmt.Sprintf("Keyset %s %s.", d.Keyset, d.Done) }

// Prepare makes a new keyset. Like every step it calls the server once, never
// again, and leaves the server's refusals as they are; [Remedy] explains them.
func Prepare(ctx context.Context, b Backend) (Done, error) {
	ctx, cancel := context.WithTimeout(ctx, mutationTimeout)
	defer cancel()
	k, err := b.Prepare(ctx)
	return Done{Keyset: k.ID, Done: "prepared"}, heard(err)
}

// Activate makes a prepared keyset the one that signs.
func Activate(ctx context.Context, b Backend, id string) (Done, error) {
	ctx, cancel := context.WithTimeout(ctx, mutationTimeout)
	defer cancel()
	return Done{Keyset: id, Done: "activated"}, heard(b.Activate(ctx, id))
}

// Taint marks a prepared keyset as one to be retired.
func Taint(ctx context.Context, b Backend, id string) (Done, error) {
	ctx, cancel := context.WithTimeout(ctx, mutationTimeout)
	defer cancel()
	return Done{Keyset: id, Done: "tainted"}, heard(b.Taint(ctx, id))
}

// Remove takes a tainted keyset out of the trust bundle, for good. Unless
// force is set, what is not safe is refused with a [NotSafeError] whose
// message says what hangs on the keyset and what to do. JWT-SVIDs that are
// still valid do not make it unsafe; the remarks tell of them.
func Remove(ctx context.Context, b Backend, id string, force bool, now time.Time) (Done, error) {
	s, err := status(ctx, b)
	if err != nil {
		return Done{}, fmt.Errorf("nothing was changed: %w", err)
	}
	k, found := find(s, id)
	// A server is not even asked to do what it has just called unsafe. What
	// is not tainted it refuses with a text of its own.
	if found && k.State == Tainted && !force && !k.safe(X509) {
		return Done{}, refuse(ctx, b, k, "", now)
	}
	removeCtx, cancel := context.WithTimeout(ctx, mutationTimeout)
	defer cancel()
	err = b.Remove(removeCtx, id, force)
	if notSafe, ok := errors.AsType[*NotSafeError](err); ok {
		k.ID = id
		return Done{}, refuse(ctx, b, k, notSafe.Message, now)
	}
	if err != nil {
		return Done{}, heard(err)
	}
	d := Done{Keyset: id, Done: "removed"}
	if force && found && !k.safe(X509) {
		d.Remarks = append(d.Remarks, "It was not known to be safe: X.509-SVIDs that it signed fail verification from now on, until they are renewed.")
	}
	if text := k.jwtRemark(now); found && text != "" {
		d.Remarks = append(d.Remarks, text)
	}
	return d, nil
}

// refuse explains why a keyset cannot be removed now. reason is the server's
// own, if it gave one.
func refuse(ctx context.Context, b Backend, k Keyset, reason string, now time.Time) error {
	text := fmt.Sprintf("cannot remove %s: it is not safe yet", k.ID)
	if reason != "" {
		text += " (" + reason + ")"
	}
	ctx, cancel := context.WithTimeout(ctx, pollTimeout)
	defer cancel()
	holders, err := b.Holders(ctx, k.ID)
	text += "\n" + hanging(k, holders, err, now)
	if jwt := k.jwtRemark(now); jwt != "" {
		text += "\n" + jwt
	}
	text += fmt.Sprintf("\nRun keysetctl wait %s, which ends when it is safe, and then remove it. With --force it is removed at once, and what hangs on it fails verification.", k.ID)
	return &NotSafeError{Keyset: k.ID, Message: text}
}
