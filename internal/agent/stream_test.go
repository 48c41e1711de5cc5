package agent_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"slices"
	"sync"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"

	"github.com/renewd/renewd/internal/server/spireapi"
)

// stream is a workload with an open FetchX509SVID stream. It checks each update.
type stream struct {
	w      *world
	values []string // of its selectors
	conn   *connection
	cancel context.CancelFunc
	done   chan struct{}

	mu      sync.Mutex
	updates []update
	end     error     // why the stream ended
	ended   time.Time // when it did
	left    bool      // the workload ended it
}

// update is one message of a stream.
type update struct {
	at          time.Time
	authorities []string             // that signed its SVIDs
	ends        map[string]time.Time // when the last SVID of each of them expires
	expiry      time.Time            // of the first to expire
	identities  int
	ids         []string // SPIFFE IDs
	names       []string // DNS names of the first identity
	serial      string   // serial number of its SVID
}

func (w *world) open(selectors ...int) *stream { return w.openAs(testValues(selectors)...) }

// openAs is open with other selectors of the type test.
func (w *world) openAs(values ...string) *stream { return w.begin(values...).open() }

// open opens a stream of the process on a new connection.
func (p *process) open() *stream {
	w := p.w
	s := &stream{w: w, values: p.values, conn: p.connect(), done: make(chan struct{})}
	ctx, cancel := context.WithCancel(workloadContext(context.Background()))
	s.cancel = cancel
	rpc, err := workloadpb.NewSpiffeWorkloadAPIClient(s.conn).FetchX509SVID(ctx, &workloadpb.X509SVIDRequest{})
	w.check(err)
	go func() {
		defer close(s.done)
		for {
			res, err := rpc.Recv()
			s.mu.Lock()
			if err != nil {
				s.end, s.ended = err, time.Now()
				s.mu.Unlock()
				return
			}
			u := w.read(res)
			s.updates = append(s.updates, u)
			s.mu.Unlock()
			for _, id := range u.ids {
				if !w.assigns(id, p.values, func(spireapi.StoredEntry) bool { return true }) {
					w.t.Errorf("a workload with %q was shown %s, which no entry has ever assigned to it", p.values, id)
				}
			}
		}
	}()
	return s
}

// read checks a message as a careful client does: every SVID is valid now, by a correct
// clock, and verifies with the bundle in the same message.
func (w *world) read(res *workloadpb.X509SVIDResponse) update {
	u := update{at: time.Now(), identities: len(res.Svids), ends: make(map[string]time.Time)}
	if len(res.Svids) == 0 {
		w.t.Error("a stream got an answer without SVIDs")
	}
	for i, s := range res.Svids {
		u.ids = append(u.ids, s.SpiffeId)
		if i >= 3 && i < len(res.Svids)-3 {
			// Check the first and last of a large set: each takes a millisecond.
			continue
		}
		chain, err := x509.ParseCertificates(s.X509Svid)
		if err != nil {
			w.t.Errorf("stream: %v", err)
			continue
		}
		roots, err := x509.ParseCertificates(s.Bundle)
		if err != nil {
			w.t.Errorf("stream: %v", err)
			continue
		}
		pool := x509.NewCertPool()
		for _, r := range roots {
			pool.AddCert(r)
		}
		if len(chain[0].URIs) != 1 || chain[0].URIs[0].String() != s.SpiffeId {
			w.t.Errorf("an SVID of %v was shown as %s", chain[0].URIs, s.SpiffeId)
		}
		id := hex.EncodeToString(chain[0].AuthorityKeyId)
		if !slices.Contains(u.authorities, id) {
			u.authorities = append(u.authorities, id)
		}
		if chain[0].NotAfter.After(u.ends[id]) {
			u.ends[id] = chain[0].NotAfter
		}
		if w.unchecked {
			continue
		}
		if _, err := chain[0].Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
			w.t.Errorf("%s: an SVID does not verify with the bundle of the same answer: %v", s.SpiffeId, err)
		}
		if _, err := tls.X509KeyPair(pemCert(s.X509Svid), pemKey(s.X509SvidKey)); err != nil {
			w.t.Errorf("%s: %v", s.SpiffeId, err)
		}
		if i == 0 {
			u.names, u.serial = chain[0].DNSNames, chain[0].SerialNumber.String()
		}
		if u.expiry.IsZero() || chain[0].NotAfter.Before(u.expiry) {
			u.expiry = chain[0].NotAfter
		}
	}
	return u
}

func (s *stream) last() (update, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.updates) == 0 {
		return update{}, false
	}
	return s.updates[len(s.updates)-1], true
}

// close ends the stream from the client's side, and its process.
func (s *stream) close() {
	s.leave()
	s.conn.Close()
}

// leave ends the stream from the client's side. The process keeps its SVIDs.
func (s *stream) leave() {
	s.mu.Lock()
	s.left = s.end == nil
	s.mu.Unlock()
	s.cancel()
	<-s.done
	s.conn.leave()
}

// checkUnbroken fails the test unless the stream is open and has had valid SVIDs since its
// first message.
func (s *stream) checkUnbroken() {
	s.w.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.end != nil {
		s.w.t.Errorf("a stream ended: %v", s.end)
		return
	}
	if len(s.updates) == 0 {
		s.w.t.Error("a stream got no answer")
		return
	}
	for i, u := range s.updates {
		until := s.w.now()
		if i+1 < len(s.updates) {
			until = s.updates[i+1].at
		}
		if until.After(u.expiry) {
			s.w.t.Errorf("a stream had no valid SVID for %v", until.Sub(u.expiry))
		}
	}
}
