// Package federation fetches the trust bundles of other trust domains from their
// bundle endpoints (SPIFFE Federation, sections 4 to 6), so that workloads can verify
// workloads of those trust domains.
//
// It polls each endpoint as often as the bundle's refresh hint says, within limits. An
// endpoint with profile https_web is verified like any web server. An endpoint with
// profile https_spiffe has an X.509-SVID, which is verified with the newest bundle of
// the endpoint's trust domain. So the other side can replace its keys, and each bundle
// verifies the fetch of the next. The first one comes from a file.
//
// An invalid answer changes nothing. An answer that is older than the current bundle
// is accepted only after [lagLimit], because a lagging replica would undo the
// removal of a key. The size of an answer and the time of a fetch are bounded. The
// bundles survive a restart.
package federation

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/internal/config"
)

// The profiles of a bundle endpoint (SPIFFE Federation, section 5.2).
const (
	ProfileSPIFFE = "https_spiffe"
	ProfileWeb    = "https_web"
)

// Endpoint is the bundle endpoint of a trust domain. [Check] checks its fields.
type Endpoint struct {
	TrustDomain spiffeid.TrustDomain
	URL         string
	Profile     string
	// ID is the SPIFFE ID of an endpoint with profile https_spiffe. It may be in any
	// trust domain whose bundle the [Follower] has.
	ID spiffeid.ID
	// BundleFile has the initial bundle, in SPIFFE's format or as PEM. After the first
	// fetch it is not used, until its content changes.
	BundleFile string
}

// Record is the stored bundle of a trust domain.
type Record struct {
	TrustDomain spiffeid.TrustDomain
	// Bundle is in SPIFFE's format.
	Bundle []byte
	// FetchedAt is when it was fetched from the endpoint; zero if it is from the file.
	FetchedAt time.Time
	// File is the digest of the file with the initial bundle; empty if there was none.
	File string
}

// Storage stores records. A change is durable when the method returns nil.
// Implementations are safe for concurrent use.
type Storage interface {
	// Federated returns all records, in any order.
	Federated(ctx context.Context) ([]Record, error)
	// SaveFederated adds a record or replaces the one of its trust domain.
	SaveFederated(ctx context.Context, r Record) error
	// ForgetFederated deletes the record of a trust domain.
	ForgetFederated(ctx context.Context, td spiffeid.TrustDomain) error
}

// Config configures a [Follower]. TrustDomain, Storage and Publish are required.
type Config struct {
	// TrustDomain is this server's trust domain. Own returns its X.509 authorities, for
	// endpoints whose SPIFFE ID is in it.
	TrustDomain spiffeid.TrustDomain
	Own         func() []*x509.Certificate
	// Endpoints have passed [Check]. [Follower.Reload] replaces them.
	Endpoints []Endpoint
	Storage   Storage
	// Publish is called with each new bundle, which must not be modified, and with nil
	// if it has no X.509 authority: that trust domain is then no longer trusted. [New]
	// and Run call it, never concurrently for one trust domain.
	Publish func(td spiffeid.TrustDomain, b *spiffebundle.Bundle)
	// Observe, if set, is called with the outcome of each refresh, such as
	// [bundle.OutcomeApplied].
	Observe func(td spiffeid.TrustDomain, outcome string)

	// Roots verify endpoints with profile https_web; the system's when nil.
	Roots *x509.CertPool
	// Dial connects to endpoints. When nil, a plain dialer with the proxy of the
	// environment is used.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	Log  *slog.Logger     // discards when nil
	Now  func() time.Time // time.Now when nil
}

// Follower keeps the bundles of other trust domains current. Create it with [New]. Its
// methods are safe for concurrent use.
type Follower struct {
	cfg   Config
	peers atomic.Pointer[peers] // those to follow
	wake  chan struct{}         // peers has changed
}

// peers are immutable.
type peers map[spiffeid.TrustDomain]*peer

// New loads the bundles from the storage and from files, and publishes them. It deletes the
// records of trust domains that are no longer configured.
func New(ctx context.Context, cfg Config) (*Follower, error) {
	cfg.Log = cmp.Or(cfg.Log, slog.New(slog.DiscardHandler))
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Own == nil {
		cfg.Own = func() []*x509.Certificate { return nil }
	}
	if cfg.Observe == nil {
		cfg.Observe = func(spiffeid.TrustDomain, string) {}
	}
	f := &Follower{cfg: cfg, wake: make(chan struct{}, 1)}
	stored, err := f.load(ctx)
	if err != nil {
		return nil, err
	}
	all := make(peers)
	for _, e := range cfg.Endpoints {
		p := f.newPeer(e)
		all[e.TrustDomain] = p
		if err := f.setInitial(ctx, p, stored[e.TrustDomain]); err != nil {
			return nil, err
		}
	}
	f.peers.Store(&all)
	return f, nil
}

// Reload reads the files with initial bundles and returns the function that replaces the
// endpoints. Nothing has changed if it returns an error. Endpoints must have passed [Check].
//
// Run then withdraws the bundle of a trust domain that is no longer followed and deletes
// its record. An endpoint that has changed starts with the bundle held, unless the content
// of its file has changed, too: see [Endpoint].
func (f *Follower) Reload(endpoints []Endpoint) (apply func(), err error) {
	before, after := *f.peers.Load(), make(peers)
	var errs []error
	for _, e := range endpoints {
		file, err := readInitial(e)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		p := before[e.TrustDomain]
		if p == nil || p.Endpoint != e || file != nil && file.Digest() != p.file {
			changed := f.newPeer(e)
			if p != nil {
				changed.current.Store(p.current.Load()) // until begin
			}
			if file != nil {
				changed.initial, changed.file = file, file.Digest()
			}
			p = changed
		}
		after[e.TrustDomain] = p
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return func() {
		f.peers.Store(&after)
		select {
		case f.wake <- struct{}{}:
		default:
		}
	}, nil
}

// load returns the records of configured trust domains and deletes the others.
func (f *Follower) load(ctx context.Context) (map[spiffeid.TrustDomain]*Record, error) {
	stored := make(map[spiffeid.TrustDomain]*Record)
	records, err := f.cfg.Storage.Federated(ctx)
	if err != nil {
		return nil, fmt.Errorf("load federated bundles: %w", err)
	}
	configured := make(map[spiffeid.TrustDomain]bool)
	for _, e := range f.cfg.Endpoints {
		configured[e.TrustDomain] = true
	}
	for i, r := range records {
		if configured[r.TrustDomain] {
			stored[r.TrustDomain] = &records[i]
			continue
		}
		if err := f.forget(ctx, r.TrustDomain); err != nil {
			return nil, fmt.Errorf("delete the bundle of %q: %w", r.TrustDomain.Name(), err)
		}
	}
	return stored, nil
}

// forget deletes the record of a trust domain.
func (f *Follower) forget(ctx context.Context, td spiffeid.TrustDomain) error {
	if err := f.cfg.Storage.ForgetFederated(ctx, td); err != nil {
		return err
	}
	f.cfg.Log.Warn("federated bundle deleted, its trust domain is no longer configured: workloads do not get it", "trust_domain", td.Name())
	return nil
}

// readInitial reads the file of an endpoint with the initial bundle; nil if it has none.
func readInitial(e Endpoint) (*bundle.Document, error) {
	if e.BundleFile == "" {
		return nil, nil
	}
	doc, err := readFile(e.BundleFile)
	if err != nil {
		wrong := &EndpointError{e.TrustDomain, "bundle_file", fmt.Sprintf("cannot be used: %v", err), "write the bundle of " + e.TrustDomain.Name() + " to it, in SPIFFE's format or as PEM"}
		if config.IsPermanent(err) {
			return nil, config.Permanent(wrong)
		}
		return nil, wrong
	}
	return doc, nil
}

// setInitial sets the initial bundle: the stored one or the one of the file. A file whose
// content differs from the file of the stored bundle takes precedence, because an operator
// has changed it (SPIFFE Federation, section 4.2).
func (f *Follower) setInitial(ctx context.Context, p *peer, stored *Record) error {
	first, err := readInitial(p.Endpoint)
	if err != nil {
		return err
	}
	if first != nil {
		p.file = first.Digest()
	}
	if stored != nil && (first == nil || p.file == stored.File) {
		b, left, err := parse(p.TrustDomain, stored.Bundle)
		if err == nil {
			p.file = stored.File
			p.set(&current{bundle: b, leftOut: left, fetchedAt: stored.FetchedAt, stored: true})
			return nil
		}
		// Fetching it again is better than a server that does not start.
		f.cfg.Log.Warn("stored federated bundle cannot be used", "trust_domain", p.TrustDomain.Name(), "error", err)
	}
	if first == nil {
		return nil
	}
	f.useFile(p, first)
	return f.save(ctx, p)
}

// useFile sets the bundle of the file, whose digest p has.
func (f *Follower) useFile(p *peer, file *bundle.Document) {
	b := fromDocument(p.TrustDomain, file)
	f.cfg.Log.Info("federated bundle read from its file", append(p.attrs(b), "path", p.BundleFile)...)
	f.logLeftOut(p, nil, file.LeftOut)
	p.set(&current{bundle: b, leftOut: file.LeftOut})
}

// Run polls all endpoints until ctx is done and then returns nil. It must be called
// once.
func (f *Follower) Run(ctx context.Context) error {
	running := make(map[spiffeid.TrustDomain]*following)
	for {
		f.reconcile(ctx, running)
		select {
		case <-ctx.Done():
			for _, r := range running {
				<-r.ended
			}
			return nil
		case <-f.wake:
		}
	}
}

// following is the goroutine that follows a peer.
type following struct {
	*peer
	stop  context.CancelFunc
	ended chan struct{}
}

// reconcile makes the running goroutines those of the peers to follow. Only one goroutine
// of a trust domain runs at a time, so that an answer to an endpoint that is no longer
// followed changes nothing.
func (f *Follower) reconcile(ctx context.Context, running map[spiffeid.TrustDomain]*following) {
	wanted := *f.peers.Load()
	replaced := make(map[spiffeid.TrustDomain]*peer)
	for td, r := range running {
		if wanted[td] == r.peer {
			continue
		}
		r.stop()
		<-r.ended
		delete(running, td)
		replaced[td] = r.peer
		if wanted[td] == nil {
			f.withdraw(ctx, td)
		}
	}
	for td, p := range wanted {
		if running[td] != nil {
			continue
		}
		f.begin(ctx, p, replaced[td])
		r := &following{peer: p, ended: make(chan struct{})}
		var own context.Context
		own, r.stop = context.WithCancel(ctx)
		running[td] = r
		go func() {
			defer close(r.ended)
			defer r.stop()
			f.follow(own, p)
		}()
	}
}

// begin sets the first bundle of a peer that [Follower.Reload] has made; before is the peer
// that it replaces, nil if there is none. A file that has changed takes precedence.
func (f *Follower) begin(ctx context.Context, p, before *peer) {
	file := p.initial
	p.initial = nil
	var held *current
	if before != nil {
		held = before.current.Load()
	}
	switch {
	case held != nil && (file == nil || p.file == before.file):
		if file == nil {
			p.file = before.file // otherwise Reload may read it now
		}
		p.set(&current{bundle: held.bundle, leftOut: held.leftOut, fetchedAt: held.fetchedAt, stored: held.stored})
	case file != nil:
		f.useFile(p, file)
	default:
		return
	}
	f.saveIfNeeded(ctx, p)
}

// withdraw withdraws the bundle of a trust domain and deletes its record. If that fails, the
// next start deletes it.
func (f *Follower) withdraw(ctx context.Context, td spiffeid.TrustDomain) {
	f.cfg.Publish(td, nil)
	if err := f.forget(ctx, td); err != nil && ctx.Err() == nil {
		f.cfg.Log.Warn("federated bundle not deleted from the store, it is withdrawn", "trust_domain", td.Name(), "error", err)
	}
}

// Follows reports whether an endpoint of the trust domain is configured.
func (f *Follower) Follows(td spiffeid.TrustDomain) bool { return (*f.peers.Load())[td] != nil }

// Refreshed returns when each bundle was last fetched, possibly by an earlier process;
// zero if never.
func (f *Follower) Refreshed() map[spiffeid.TrustDomain]time.Time {
	out := make(map[spiffeid.TrustDomain]time.Time)
	for td, p := range *f.peers.Load() {
		out[td] = time.Time{}
		if c := p.current.Load(); c != nil {
			out[td] = c.fetchedAt
		}
	}
	return out
}

// LeftOut returns how many authorities of the current bundle of each trust domain
// cannot be used.
func (f *Follower) LeftOut() map[spiffeid.TrustDomain]int {
	out := make(map[spiffeid.TrustDomain]int)
	for td, p := range *f.peers.Load() {
		out[td] = 0
		if c := p.current.Load(); c != nil {
			out[td] = len(c.leftOut)
		}
	}
	return out
}

// authorities returns the X.509 authorities that verify an endpoint in a trust domain.
func (f *Follower) authorities(td spiffeid.TrustDomain) ([]*x509.Certificate, error) {
	if td == f.cfg.TrustDomain {
		return f.cfg.Own(), nil
	}
	if p := (*f.peers.Load())[td]; p != nil {
		if c := p.current.Load(); c != nil {
			return c.bundle.X509Authorities(), nil
		}
	}
	return nil, errors.New("no bundle of trust domain " + td.Name() + " was fetched yet")
}
