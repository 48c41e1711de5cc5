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
	"sync"
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
	// Endpoints have passed [Check].
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
	peers map[spiffeid.TrustDomain]*peer
}

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
	f := &Follower{cfg: cfg, peers: make(map[spiffeid.TrustDomain]*peer)}
	stored, err := f.load(ctx)
	if err != nil {
		return nil, err
	}
	for _, e := range cfg.Endpoints {
		p := f.newPeer(e)
		f.peers[e.TrustDomain] = p
		if err := f.setInitial(ctx, p, stored[e.TrustDomain]); err != nil {
			return nil, err
		}
	}
	return f, nil
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
		if err := f.cfg.Storage.ForgetFederated(ctx, r.TrustDomain); err != nil {
			return nil, fmt.Errorf("delete the bundle of %q: %w", r.TrustDomain.Name(), err)
		}
		f.cfg.Log.Warn("federated bundle deleted, its trust domain is no longer configured: workloads do not get it",
			"trust_domain", r.TrustDomain.Name())
	}
	return stored, nil
}

// setInitial sets the initial bundle: the stored one or the one of the file. A file whose
// content differs from the file of the stored bundle takes precedence, because an operator
// has changed it (SPIFFE Federation, section 4.2).
func (f *Follower) setInitial(ctx context.Context, p *peer, stored *Record) error {
	name := p.TrustDomain.Name()
	var first *bundle.Document
	file := ""
	if p.BundleFile != "" {
		var err error
		if first, err = readFile(p.BundleFile); err != nil {
			wrong := &EndpointError{p.TrustDomain, "bundle_file", fmt.Sprintf("cannot be used: %v", err), "write the bundle of " + name + " to it, in SPIFFE's format or as PEM"}
			if config.IsPermanent(err) {
				return config.Permanent(wrong)
			}
			return wrong
		}
		file = first.Digest()
	}
	if stored != nil && (first == nil || file == stored.File) {
		b, left, err := parse(p.TrustDomain, stored.Bundle)
		if err == nil {
			p.file = stored.File
			p.set(&current{bundle: b, leftOut: left, fetchedAt: stored.FetchedAt, stored: true})
			return nil
		}
		// Fetching it again is better than a server that does not start.
		f.cfg.Log.Warn("stored federated bundle cannot be used", "trust_domain", name, "error", err)
	}
	if first == nil {
		return nil
	}
	b := fromDocument(p.TrustDomain, first)
	f.cfg.Log.Info("federated bundle read from its file", append(p.attrs(b), "path", p.BundleFile)...)
	f.logLeftOut(p, nil, first.LeftOut)
	p.file = file
	p.set(&current{bundle: b, leftOut: first.LeftOut})
	return f.save(ctx, p)
}

// Run polls all endpoints until ctx is done and then returns nil. It must be called
// once.
func (f *Follower) Run(ctx context.Context) error {
	var work sync.WaitGroup
	for _, p := range f.peers {
		work.Go(func() { f.follow(ctx, p) })
	}
	work.Wait()
	return nil
}

// Follows reports whether an endpoint of the trust domain is configured.
func (f *Follower) Follows(td spiffeid.TrustDomain) bool { return f.peers[td] != nil }

// Refreshed returns when each bundle was last fetched, possibly by an earlier process;
// zero if never.
func (f *Follower) Refreshed() map[spiffeid.TrustDomain]time.Time {
	out := make(map[spiffeid.TrustDomain]time.Time, len(f.peers))
	for td, p := range f.peers {
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
	out := make(map[spiffeid.TrustDomain]int, len(f.peers))
	for td, p := range f.peers {
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
	if p := f.peers[td]; p != nil {
		if c := p.current.Load(); c != nil {
			return c.bundle.X509Authorities(), nil
		}
	}
	return nil, errors.New("no bundle of trust domain " + td.Name() + " was fetched yet")
}
