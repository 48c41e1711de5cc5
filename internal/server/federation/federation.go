// Package federation follows the trust bundles of other trust domains at their
// bundle endpoints (SPIFFE Federation, sections 4 to 6), so that workloads can
// verify who comes from there.
//
// The endpoint of a trust domain is asked as often as its bundle says, within
// limits. With https_web it is verified as any web server. With https_spiffe it
// proves itself with an X.509-SVID, which is verified with the newest bundle that
// is held of the trust domain it belongs to: so the other side can replace its
// keys, and each bundle leads to the next. The first one is in a file.
//
// An answer that cannot be right changes nothing, and one that is older than what
// is held does not before it has stayed for [staleLimit]: a replica that lags
// behind would take back that a key was removed. What an endpoint can make this
// process hold, and for how long, is bounded. What is held outlives a restart.
package federation

import (
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
)

// The profiles of a bundle endpoint (SPIFFE Federation, section 5.2).
const (
	ProfileSPIFFE = "https_spiffe"
	ProfileWeb    = "https_web"
)

// Endpoint is where the bundle of a trust domain is, and how that is verified.
// [Check] says what is required.
type Endpoint struct {
	TrustDomain spiffeid.TrustDomain
	URL         string
	Profile     string
	// ID is the SPIFFE ID of an endpoint with profile https_spiffe. It may be of
	// any trust domain whose bundle is held.
	ID spiffeid.ID
	// BundleFile has the bundle to begin with, in SPIFFE's format or as PEM. Once
	// something was fetched it is not used any more, until its content changes.
	BundleFile string
}

// Record is what is kept of a trust domain over a restart.
type Record struct {
	TrustDomain spiffeid.TrustDomain
	// Bundle is in SPIFFE's format.
	Bundle []byte
	// FetchedAt is when it came from the endpoint; zero when it is from the file.
	FetchedAt time.Time
	// File names the content of the file that all began with; empty when there
	// was none.
	File string
}

// Storage keeps records. What a method has changed is durable when it returns
// nil. Implementations are safe for concurrent use.
type Storage interface {
	// Federated returns all records, in any order.
	Federated(ctx context.Context) ([]Record, error)
	// SaveFederated adds a record or replaces that of its trust domain.
	SaveFederated(ctx context.Context, r Record) error
	// ForgetFederated deletes the record of a trust domain.
	ForgetFederated(ctx context.Context, td spiffeid.TrustDomain) error
}

// The outcomes of a refresh that [Config.Observe] is told.
const (
	OutcomeApplied   = "applied"   // the bundle is another one
	OutcomeUnchanged = "unchanged" // it is the one held
	OutcomeRejected  = "rejected"  // the answer cannot be right, or is older
	OutcomeFailed    = "failed"    // there was no answer
)

// Config is what a [Follower] needs. TrustDomain and Publish are required.
type Config struct {
	// TrustDomain is this server's own, and Own returns its X.509 authorities, for
	// endpoints that belong to it.
	TrustDomain spiffeid.TrustDomain
	Own         func() []*x509.Certificate
	// Endpoints are checked with [Check].
	Endpoints []Endpoint
	// Storage keeps what is held; nothing outlives the process when nil.
	Storage Storage
	// Publish is given each bundle that comes to be held, which must not be
	// modified, and nil when that has no X.509 authority: then nothing from there
	// is to be trusted any more. It is called by [New] and Run, for one trust
	// domain never concurrently.
	Publish func(td spiffeid.TrustDomain, b *spiffebundle.Bundle)
	// Observe, when set, is told the outcome of each refresh.
	Observe func(td spiffeid.TrustDomain, outcome string)

	// Roots verify endpoints with profile https_web; the system's when nil.
	Roots *x509.CertPool
	// Dial connects to endpoints; as usual, with the proxy that the environment
	// names, when nil.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	Log  *slog.Logger     // discards when nil
	Now  func() time.Time // time.Now when nil
}

// Follower holds the bundles of other trust domains and keeps them current. Make
// it with [New]; its methods are safe for concurrent use.
type Follower struct {
	cfg   Config
	peers map[spiffeid.TrustDomain]*peer
}

// New checks the configuration, reads the bundles that are kept and those in
// files, and publishes them. What is kept of a trust domain that is not configured
// any more is deleted.
func New(ctx context.Context, cfg Config) (*Follower, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Own == nil {
		cfg.Own = func() []*x509.Certificate { return nil }
	}
	if cfg.Observe == nil {
		cfg.Observe = func(spiffeid.TrustDomain, string) {}
	}
	if err := Check(cfg.TrustDomain, cfg.Endpoints); err != nil {
		return nil, err
	}
	f := &Follower{cfg: cfg, peers: make(map[spiffeid.TrustDomain]*peer)}
	kept, err := f.load(ctx)
	if err != nil {
		return nil, err
	}
	for _, e := range cfg.Endpoints {
		p := f.newPeer(e)
		f.peers[e.TrustDomain] = p
		if err := f.begin(ctx, p, kept[e.TrustDomain]); err != nil {
			return nil, err
		}
	}
	return f, nil
}

// load returns the records of trust domains that are configured and deletes the
// others.
func (f *Follower) load(ctx context.Context) (map[spiffeid.TrustDomain]*Record, error) {
	kept := make(map[spiffeid.TrustDomain]*Record)
	if f.cfg.Storage == nil {
		return kept, nil
	}
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
			kept[r.TrustDomain] = &records[i]
			continue
		}
		if err := f.cfg.Storage.ForgetFederated(ctx, r.TrustDomain); err != nil {
			return nil, fmt.Errorf("forget the bundle of %q: %w", r.TrustDomain.Name(), err)
		}
		f.cfg.Log.Warn("trust domain is not followed any more: its bundle is forgotten, and workloads do not get it any more",
			"trust_domain", r.TrustDomain.Name())
	}
	return kept, nil
}

// begin decides what is held at first: what was fetched, or what the file has. A
// file with another content than the one that all began with is the operator's word
// and counts for more (SPIFFE Federation, section 4.2).
func (f *Follower) begin(ctx context.Context, p *peer, kept *Record) error {
	name := p.TrustDomain.Name()
	var first *bundle.Document
	file := ""
	if p.BundleFile != "" {
		var err error
		if first, err = readFile(p.BundleFile); err != nil {
			return &EndpointError{p.TrustDomain, "bundle_file", fmt.Sprintf("cannot be used: %v", err), "write the bundle of " + name + " to it, in SPIFFE's format or as PEM"}
		}
		file = first.Digest()
	}
	if kept != nil && (first == nil || file == kept.File) {
		b, left, err := parse(p.TrustDomain, kept.Bundle)
		if err == nil {
			p.file = kept.File
			p.hold(&held{bundle: b, leftOut: left, fetchedAt: kept.FetchedAt, kept: true})
			return nil
		}
		// It could be read when it was kept. To serve nobody because of it would
		// be worse than to fetch it again.
		f.cfg.Log.Warn("federated bundle that was kept cannot be used", "trust_domain", name, "error", err)
	}
	if first == nil {
		return nil
	}
	b := fromDocument(p.TrustDomain, first)
	f.cfg.Log.Info("federated bundle is taken from its file", append(p.about(b), "file", p.BundleFile)...)
	f.logLeftOut(p, nil, first.LeftOut)
	p.file = file
	p.hold(&held{bundle: b, leftOut: first.LeftOut})
	return f.keep(ctx, p)
}

// Run follows all endpoints until ctx is done and returns nil then. It is to be
// called once.
func (f *Follower) Run(ctx context.Context) error {
	var work sync.WaitGroup
	for _, p := range f.peers {
		work.Go(func() { f.follow(ctx, p) })
	}
	work.Wait()
	return nil
}

// Follows reports whether the trust domain has an endpoint that is followed.
func (f *Follower) Follows(td spiffeid.TrustDomain) bool { return f.peers[td] != nil }

// Refreshed returns when each endpoint last gave its bundle, or of one that has
// not since the start of the process, the one that was kept. The time is zero when
// there is none.
func (f *Follower) Refreshed() map[spiffeid.TrustDomain]time.Time {
	out := make(map[spiffeid.TrustDomain]time.Time, len(f.peers))
	for td, p := range f.peers {
		out[td] = time.Time{}
		if h := p.held.Load(); h != nil {
			out[td] = h.fetchedAt
		}
	}
	return out
}

// LeftOut returns how many authorities of the bundle that is held of each trust
// domain cannot be used.
func (f *Follower) LeftOut() map[spiffeid.TrustDomain]int {
	out := make(map[spiffeid.TrustDomain]int, len(f.peers))
	for td, p := range f.peers {
		out[td] = 0
		if h := p.held.Load(); h != nil {
			out[td] = len(h.leftOut)
		}
	}
	return out
}

// authorities are what an endpoint of a trust domain is verified with.
func (f *Follower) authorities(td spiffeid.TrustDomain) ([]*x509.Certificate, error) {
	if td == f.cfg.TrustDomain {
		return f.cfg.Own(), nil
	}
	if p := f.peers[td]; p != nil {
		if h := p.held.Load(); h != nil {
			return h.bundle.X509Authorities(), nil
		}
	}
	return nil, errors.New("no bundle of trust domain " + td.Name() + " is held yet")
}
