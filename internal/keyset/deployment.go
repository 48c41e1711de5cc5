package keyset

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// DefaultLifetime is how long a keyset lives.
const DefaultLifetime = 90 * 24 * time.Hour

// mutationTimeout bounds a mutation together with its commit, so that one that
// its caller has given up on does not keep others out for ever.
const mutationTimeout = 120 * time.Second

// Config says which deployment to open. Only TrustDomain is required.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	// Name is the deployment's name within the trust domain; "default" when
	// empty.
	Name string
	// Storage keeps the keysets; memory when nil.
	Storage Storage
	// Lifetime is how long a new keyset lives; DefaultLifetime when zero. It
	// must be at least an hour.
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

	mutating atomic.Bool
	current  atomic.Pointer[snapshot]
}

// Open loads the keysets of a deployment. Where none was ever stored it makes
// the first one, which is active.
func Open(ctx context.Context, c Config) (*Deployment, error) {
	if c.TrustDomain.IsZero() {
		return nil, errors.New("open keysets: no trust domain")
	}
	d := &Deployment{td: c.TrustDomain, name: c.Name, storage: c.Storage, lifetime: c.Lifetime, now: c.Now}
	if d.name == "" {
		d.name = "default"
	}
	if d.storage == nil {
		d.storage = new(Memory)
	}
	if d.lifetime == 0 {
		d.lifetime = DefaultLifetime
	}
	if d.lifetime < time.Hour {
		return nil, fmt.Errorf("open keysets: lifetime %v is below an hour", d.lifetime)
	}
	if d.now == nil {
		d.now = time.Now
	}
	doc, err := d.storage.Load(ctx)
	if err != nil {
		return nil, fmt.Errorf("open keysets: load: %w", err)
	}
	if doc.Version > 0 {
		err = d.publish(doc)
	} else {
		err = d.mutate(ctx, "create", d.first)
	}
	if errors.Is(err, ErrBusy) {
		// Another process made the first keyset at the same moment.
		_, err = d.List(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("open keysets: %w", err)
	}
	return d, nil
}

func (d *Deployment) first(doc *Document, _ string) (id string, err error) {
	if len(doc.Records) > 0 {
		return "", ErrBusy
	}
	r, err := newRecord(d.td, newID(), d.now(), d.lifetime)
	if err != nil {
		return "", err
	}
	r.State = Active
	doc.Records = []Record{r}
	doc.RotatedAt = r.IssuedAt
	doc.Sequence++
	return r.ID, nil
}

// TrustDomain is the trust domain that the keysets sign for.
func (d *Deployment) TrustDomain() spiffeid.TrustDomain { return d.td }

// Name is the deployment's name.
func (d *Deployment) Name() string { return d.name }

// List reads the keysets from storage, in order of issue. After a mutation
// whose outcome is unknown this is the way to learn it; what is found is also
// what is signed with and published from then on.
func (d *Deployment) List(ctx context.Context) ([]Keyset, error) {
	doc, err := d.storage.Load(ctx)
	if err != nil {
		return nil, fmt.Errorf("list keysets: load: %w", err)
	}
	if err := d.publish(doc); err != nil {
		return nil, fmt.Errorf("list keysets: %w", err)
	}
	return slices.Clone(d.current.Load().keysets), nil
}

// Active describes the keyset that signs at this moment.
func (d *Deployment) Active() Keyset { return d.current.Load().active.keyset }

// Bundle returns what is published at this moment.
func (d *Deployment) Bundle() *Bundle { return d.current.Load().bundle }

// BundlePEM returns the published X.509 authorities as PEM certificates.
func (d *Deployment) BundlePEM() []byte { return d.Bundle().PEM() }

// Prepare makes a new keyset: published, not signing.
//
// Like every mutation it returns after the new state is stored and published,
// at the latest after two minutes, and is never retried. It is refused with
// ErrBusy while another mutation of the deployment is in flight. Any other
// error from storage leaves the outcome open until the next List.
func (d *Deployment) Prepare(ctx context.Context) (Keyset, error) {
	var id string
	err := d.mutate(ctx, "prepare", func(doc *Document, _ string) (string, error) {
		id = newID()
		for find(doc, id) != nil {
			id = newID()
		}
		r, err := newRecord(d.td, id, d.now(), d.lifetime)
		if err != nil {
			return "", err
		}
		doc.Records = append(doc.Records, r)
		doc.Sequence++
		return id, nil
	})
	if err != nil {
		return Keyset{}, operation("prepare", err)
	}
	return d.published(id), nil
}

// Activate makes a prepared keyset the one that signs. The one that did steps
// down to PREPARED: still published and trusted.
func (d *Deployment) Activate(ctx context.Context, id string) error {
	return operation("activate", d.mutate(ctx, "activate", func(doc *Document, actor string) (string, error) {
		r := find(doc, id)
		switch {
		case r == nil:
			return "", ErrNotFound
		case r.State == Active:
			return "", ErrActivateActive
		case r.State == Tainted:
			return "", ErrActivateTainted
		case !d.now().Before(r.ExpiresAt):
			return "", ErrActivateExpired
		}
		for i := range doc.Records {
			if doc.Records[i].State == Active {
				old := &doc.Records[i]
				old.State, old.SteppedDownAt, old.SteppedDownBy = Prepared, d.now().UTC(), actor
			}
		}
		r.State, r.SteppedDownAt, r.SteppedDownBy = Active, time.Time{}, ""
		doc.RotatedAt = d.now().UTC()
		return id, nil
	}))
}

// Taint marks a prepared keyset: still published and trusted, and everything
// that it signed is to be replaced.
func (d *Deployment) Taint(ctx context.Context, id string) error {
	return operation("taint", d.mutate(ctx, "taint", func(doc *Document, actor string) (string, error) {
		r := find(doc, id)
		switch {
		case r == nil:
			return "", ErrNotFound
		case r.State == Active:
			return "", ErrTaintActive
		case r.State == Tainted:
			return "", ErrTaintTainted
		}
		r.State, r.TaintedAt = Tainted, d.now().UTC()
		doc.Sequence++
		return id, nil
	}))
}

// Remove deletes a tainted keyset with its keys, for good. What it signed no
// longer verifies.
func (d *Deployment) Remove(ctx context.Context, id string) error {
	return operation("remove", d.mutate(ctx, "remove", func(doc *Document, actor string) (string, error) {
		r := find(doc, id)
		switch {
		case r == nil:
			return "", ErrNotFound
		case r.State == Active:
			return "", ErrRemoveActive
		case r.State == Prepared:
			return "", ErrRemovePrepared
		}
		doc.Records = slices.DeleteFunc(doc.Records, func(r Record) bool { return r.ID == id })
		doc.Sequence++
		return id, nil
	}))
}

// mutate commits one change and publishes what follows from it. What is stored
// decides, not what this process published last.
// change is told who acts and returns the ID of the keyset that it is about.
func (d *Deployment) mutate(ctx context.Context, operation string, change func(doc *Document, actor string) (id string, err error)) error {
	if !d.mutating.CompareAndSwap(false, true) {
		return ErrBusy
	}
	defer d.mutating.Store(false)
	ctx, cancel := context.WithTimeout(ctx, mutationTimeout)
	defer cancel()

	doc, err := d.storage.Load(ctx)
	if err != nil {
		return fmt.Errorf("load: %w", err)
	}
	entry := Change{At: d.now().UTC(), Actor: actor(ctx), Operation: operation, Before: states(doc), Note: note(ctx)}
	if entry.KeysetID, err = change(&doc, entry.Actor); err != nil {
		return err
	}
	entry.After = states(doc)
	doc.Version++
	// Parse before the commit: what could not be used must not be stored.
	next, err := newSnapshot(d.td, doc)
	if err != nil {
		return err
	}
	switch err := d.storage.Save(ctx, doc, entry); {
	case errors.Is(err, ErrConflict):
		return ErrBusy
	case err != nil:
		return fmt.Errorf("save: %w", err)
	}
	d.advance(next)
	return nil
}

func states(doc Document) map[string]State {
	out := make(map[string]State, len(doc.Records))
	for _, r := range doc.Records {
		out[r.ID] = r.State
	}
	return out
}

// publish makes a stored Document the one that is signed with.
func (d *Deployment) publish(doc Document) error {
	if cur := d.current.Load(); cur != nil && cur.version >= doc.Version {
		return nil
	}
	next, err := newSnapshot(d.td, doc)
	if err != nil {
		return err
	}
	d.advance(next)
	return nil
}

// advance swaps the snapshot unless a newer one is in place already.
func (d *Deployment) advance(next *snapshot) {
	for {
		cur := d.current.Load()
		if cur != nil && cur.version >= next.version {
			return
		}
		if d.current.CompareAndSwap(cur, next) {
			return
		}
	}
}

func (d *Deployment) published(id string) Keyset {
	for _, k := range d.current.Load().keysets {
		if k.ID == id {
			return k
		}
	}
	return Keyset{}
}

func find(doc *Document, id string) *Record {
	for i := range doc.Records {
		if doc.Records[i].ID == id {
			return &doc.Records[i]
		}
	}
	return nil
}

// operation names the operation in an error, except in a Refusal, whose text
// the operator is to see as it is.
func operation(name string, err error) error {
	if _, ok := errors.AsType[Refusal](err); ok || err == nil {
		return err
	}
	return fmt.Errorf("%s keyset: %w", name, err)
}
