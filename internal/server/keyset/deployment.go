package keyset

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/internal/refusal"
	"github.com/renewd/renewd/internal/server/detach"
)

// DefaultLifetime is the default lifetime of a keyset.
const DefaultLifetime = 90 * 24 * time.Hour

// Config describes the deployment to open. TrustDomain and Storage are required.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	// Name is the deployment's name within the trust domain; "default" when
	// empty.
	Name    string
	Storage Storage
	// Lifetime is the lifetime of a new keyset; DefaultLifetime when zero. It must
	// be at least an hour.
	Lifetime time.Duration
	// Now is the clock; time.Now when nil.
	Now func() time.Time
}

// Deployment holds the keysets of one deployment. All methods may be called
// concurrently. Reading and signing never wait for a mutation.
type Deployment struct {
	td       spiffeid.TrustDomain
	name     string
	storage  Storage
	lifetime time.Duration
	now      func() time.Time

	mutating  atomic.Bool  // a mutation is in flight
	mutations detach.Group // see mutate
	current   atomic.Pointer[snapshot]
}

// Open loads the keysets of a deployment. If none was ever stored, it makes the first
// one, which is active.
func Open(ctx context.Context, c Config) (*Deployment, error) {
	d := &Deployment{
		td: c.TrustDomain, name: cmp.Or(c.Name, "default"), storage: c.Storage,
		lifetime: cmp.Or(c.Lifetime, DefaultLifetime), now: c.Now,
	}
	if d.now == nil {
		d.now = time.Now
	}
	doc, err := d.storage.Load(ctx)
	if err != nil {
		return nil, fmt.Errorf("open keysets: load: %w", err)
	}
	if doc.Version > 0 {
		_, err = d.publish(doc)
	} else {
		_, err = d.mutate(ctx, "create", nil, d.first)
	}
	if errors.Is(err, refusal.ErrBusy) {
		// Another process made the first keyset at the same moment.
		_, err = d.List(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("open keysets: %w", err)
	}
	return d, nil
}

func (d *Deployment) first(doc *Document, c *Change) error {
	if len(doc.Records) > 0 {
		return refusal.ErrBusy
	}
	r, err := newRecord(d.td, newID(), c.At, c.At, d.lifetime)
	if err != nil {
		return err
	}
	r.State = Active
	c.KeysetID = r.ID
	doc.Records = []Record{r}
	doc.RotatedAt = r.IssuedAt
	doc.Sequence++
	return nil
}

// Name returns the deployment's name.
func (d *Deployment) Name() string { return d.name }

// Lifetime returns the lifetime of a new keyset.
func (d *Deployment) Lifetime() time.Duration { return d.lifetime }

// List loads the keysets from storage and returns them in order of issue. It also
// resolves the unknown outcome of a mutation: the Deployment signs with the loaded
// keysets and publishes them from then on.
func (d *Deployment) List(ctx context.Context) ([]Keyset, error) {
	doc, err := d.storage.Load(ctx)
	if err != nil {
		return nil, fmt.Errorf("list keysets: load: %w", err)
	}
	if _, err := d.publish(doc); err != nil {
		return nil, fmt.Errorf("list keysets: %w", err)
	}
	return d.Status().Keysets, nil
}

// Status is a consistent view of a deployment.
type Status struct {
	Keysets   []Keyset // in order of issue
	RotatedAt time.Time
	Bundle    *Bundle // the published one
	// Changed is closed when the status is replaced. To follow a deployment, take a
	// Status, act on it, wait for Changed and take the next: no change is missed,
	// and several may be combined.
	Changed <-chan struct{}
}

// Status returns the keysets that this process signs with and the bundle that it
// publishes. It does not read storage.
func (d *Deployment) Status() Status {
	s := d.current.Load()
	return Status{Keysets: slices.Clone(s.keysets), RotatedAt: s.rotatedAt, Bundle: s.bundle, Changed: s.replaced}
}

// Active returns the keyset that signs.
func (d *Deployment) Active() Keyset { return d.current.Load().active.keyset }

// Bundle returns the published bundle. It returns the same pointer until the bundle
// changes.
func (d *Deployment) Bundle() *Bundle { return d.current.Load().bundle }

// BundlePEM returns the published X.509 authorities as PEM certificates.
func (d *Deployment) BundlePEM() []byte { return d.Bundle().PEM() }

// Prepare makes a new keyset: published, not signing. Its CA certificate is valid from
// when the active keyset was issued; see [Keyset].
//
// Like every mutation, it returns after the new state is stored and published, at the
// latest after two minutes, and is never retried. It is refused with ErrBusy while
// another mutation of the deployment is in flight. After any other error from storage
// the outcome is unknown until the next List.
func (d *Deployment) Prepare(ctx context.Context, checks ...Check) (Keyset, error) {
	then, err := d.mutate(ctx, "prepare", checks, func(doc *Document, c *Change) error {
		c.KeysetID = newID()
		for find(doc, c.KeysetID) != nil {
			c.KeysetID = newID()
		}
		r, err := newRecord(d.td, c.KeysetID, activeSince(doc), c.At, d.lifetime)
		if err != nil {
			return err
		}
		doc.Records = append(doc.Records, r)
		doc.Sequence++
		return nil
	})
	if err != nil {
		return Keyset{}, err
	}
	return then.keysets[len(then.keysets)-1], nil
}

// activeSince returns when the active keyset was issued.
func activeSince(doc *Document) time.Time {
	for _, r := range doc.Records {
		if r.State == Active {
			return r.IssuedAt
		}
	}
	return time.Time{} // newSnapshot refuses such a document
}

// Activate makes a prepared keyset the one that signs. The previous one steps down to
// PREPARED: still published and trusted. A keyset that was issued in the future, by a
// clock that was ahead, is refused until that time.
func (d *Deployment) Activate(ctx context.Context, id string, checks ...Check) error {
	_, err := d.mutate(ctx, "activate", checks, func(doc *Document, c *Change) error {
		r := find(doc, id)
		switch {
		case r == nil:
			return refusal.ErrNotFound
		case r.State == Active:
			return refusal.ErrActivateActive
		case r.State == Tainted:
			return refusal.ErrActivateTainted
		case !c.At.Before(r.ExpiresAt):
			return ErrActivateExpired
		case c.At.Before(r.IssuedAt.Add(-backdate)):
			return ErrActivateEarly
		}
		for i := range doc.Records {
			if doc.Records[i].State == Active {
				old := &doc.Records[i]
				old.State, old.SteppedDownAt, old.SteppedDownBy = Prepared, c.At, c.Actor
			}
		}
		r.State, r.SteppedDownAt, r.SteppedDownBy = Active, time.Time{}, ""
		doc.RotatedAt = c.At
		c.KeysetID = id
		return nil
	})
	return err
}

// Taint marks a prepared keyset as tainted: it is still published and trusted, and
// everything that it signed is to be replaced.
func (d *Deployment) Taint(ctx context.Context, id string, checks ...Check) error {
	_, err := d.mutate(ctx, "taint", checks, func(doc *Document, c *Change) error {
		r := find(doc, id)
		switch {
		case r == nil:
			return refusal.ErrNotFound
		case r.State == Active:
			return refusal.ErrTaintActive
		case r.State == Tainted:
			return refusal.ErrTaintTainted
		}
		r.State, r.TaintedAt = Tainted, c.At
		doc.Sequence++
		c.KeysetID = id
		return nil
	})
	return err
}

// Note adds a line to the audit log for an operation that changes no keyset; see
// [WithActor] and [WithNote].
func (d *Deployment) Note(ctx context.Context, operation string) error {
	_, err := d.mutate(ctx, operation, nil, func(*Document, *Change) error { return nil })
	return err
}

// Remove deletes a tainted keyset and its keys irreversibly. SVIDs that it signed no
// longer verify: a Check can refuse the removal while SVIDs depend on the keyset.
func (d *Deployment) Remove(ctx context.Context, id string, checks ...Check) error {
	_, err := d.mutate(ctx, "remove", checks, func(doc *Document, c *Change) error {
		r := find(doc, id)
		switch {
		case r == nil:
			return refusal.ErrNotFound
		case r.State == Active:
			return refusal.ErrRemoveActive
		case r.State == Prepared:
			return refusal.ErrRemovePrepared
		}
		doc.Records = slices.DeleteFunc(doc.Records, func(r Record) bool { return r.ID == id })
		doc.Sequence++
		c.KeysetID = id
		return nil
	})
	return err
}
