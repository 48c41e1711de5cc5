package agent_test

import (
	"context"
	"crypto/x509"
	"errors"
	"net"
	"slices"
	"time"

	agentpb "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlepb "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidpb "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/server/keyset"
)

// faults are the faults between agent and server.
type faults struct {
	down    bool          // no connection
	latency time.Duration // before every answer
	signing time.Duration // before every answer with SVIDs
	answer  time.Duration // after a stream's handler has signed, before its answer is sent
	garble  func(*svidpb.BatchNewX509SVIDRequest, *svidpb.BatchNewX509SVIDResponse) *svidpb.BatchNewX509SVIDResponse
	bundle  func(*types.Bundle)                 // changes the bundle in answers
	lag     *keyset.Record                      // signs with this keyset whatever the state
	life    func(entryID string) time.Duration  // lifetime of SVIDs, shorter than the server's
	list    func([]*types.Entry) []*types.Entry // returns a replica's list instead of the entries
	policy  bool                                // as SPIRE 1.13: agents may not post a status
}

// mint is one request to sign, as the server received it.
type mint struct {
	at      time.Time
	entries []string // nil for the agent SVID
}

// dial connects the agent to the server.
func (w *world) dial(ctx context.Context, _ string) (net.Conn, error) {
	w.mu.Lock()
	down := w.faults.down
	w.mu.Unlock()
	if down {
		return nil, errors.New("connection refused")
	}
	conn, err := w.serverLis.DialContext(ctx)
	if err == nil {
		w.mu.Lock()
		w.conns = append(w.conns, conn)
		w.mu.Unlock()
	}
	return conn, err
}

// set changes the faults. A server that goes down drops its connections.
func (w *world) set(change func(*faults)) {
	w.mu.Lock()
	change(&w.faults)
	var cut []net.Conn
	if w.faults.down {
		cut, w.conns = w.conns, nil
	}
	w.mu.Unlock()
	for _, c := range cut {
		c.Close()
	}
}

// intercept is the server's interceptor: it records requests to sign and applies the
// faults.
func (w *world) intercept(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	w.mu.Lock()
	switch r := req.(type) {
	case *bundlepb.GetBundleRequest:
		w.bundleCalls++
	case *agentpb.PostStatusRequest:
		w.statusCalls++
	case *svidpb.BatchNewX509SVIDRequest:
		m := mint{at: time.Now(), entries: []string{}}
		for _, p := range r.Params {
			m.entries = append(m.entries, p.EntryId)
		}
		w.mints = append(w.mints, m)
	case *agentpb.RenewAgentRequest:
		w.mints = append(w.mints, mint{at: time.Now()})
	case *api.ReportRequest:
		w.process, w.host = string(r.GetProcess()), r.GetHostname()
	}
	f := w.faults
	if _, ok := req.(*svidpb.BatchNewX509SVIDRequest); ok && f.lag != nil {
		asked := &mint{at: time.Now()}
		w.signing[asked] = f.lag.ID
		defer func() {
			w.mu.Lock()
			defer w.mu.Unlock()
			delete(w.signing, asked)
		}()
	}
	w.mu.Unlock()
	if _, ok := req.(*agentpb.PostStatusRequest); ok && f.policy {
		return nil, status.Error(codes.PermissionDenied, "authorization denied for the method")
	}
	wait := f.latency
	if _, ok := req.(*svidpb.BatchNewX509SVIDRequest); ok {
		wait += f.signing
	}
	if err := sleep(ctx, wait); err != nil {
		return nil, err
	}
	res, err := handler(ctx, req)
	if b, ok := res.(*types.Bundle); ok && err == nil && f.bundle != nil {
		b = proto.CloneOf(b)
		f.bundle(b)
		return b, nil
	}
	if batch, ok := res.(*svidpb.BatchNewX509SVIDResponse); ok && err == nil {
		asked := req.(*svidpb.BatchNewX509SVIDRequest)
		by := f.lag
		if by == nil && f.life != nil {
			by = w.record(w.server.Keysets().Active().ID)
		}
		for i := range batch.Results {
			if by == nil {
				break
			}
			var life time.Duration
			if f.life != nil {
				life = f.life(asked.Params[i].EntryId)
			}
			w.resign(by, life, batch.Results[i])
		}
		if f.garble != nil {
			return f.garble(asked, batch), nil
		}
	}
	return res, err
}

func (w *world) delayStream(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	w.mu.Lock()
	latency := w.faults.latency
	w.mu.Unlock()
	if err := sleep(stream.Context(), latency); err != nil {
		return err
	}
	return handler(srv, &lateStream{stream, w})
}

// lateStream sends answers late.
type lateStream struct {
	grpc.ServerStream
	w *world
}

func (l *lateStream) SendMsg(m any) error {
	l.w.mu.Lock()
	d, list := l.w.faults.answer, l.w.faults.list
	l.w.mu.Unlock()
	if answer, ok := m.(*agentpb.AttestAgentResponse); ok && answer.GetResult() != nil {
		defer l.w.attests()()
	}
	if err := sleep(l.Context(), d); err != nil {
		return err
	}
	if res, ok := m.(*entryv1.SyncAuthorizedEntriesResponse); !ok {
	} else if list != nil {
		m = &entryv1.SyncAuthorizedEntriesResponse{Entries: list(res.Entries)} // short lists come in one message
	} else {
		l.w.mu.Lock()
		l.w.listings++
		l.w.mu.Unlock()
	}
	return l.ServerStream.SendMsg(m)
}

// attests records an agent SVID in flight, signed by the active keyset, until done is
// called.
func (w *world) attests() (done func()) {
	by, asked := w.server.Keysets().Active().ID, &mint{at: time.Now()}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.signing[asked] = by
	w.attestations++
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.signing, asked)
		w.attestations--
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
}

// resign replaces an answer's certificate by one that another keyset signs, as a replica
// does that lags behind a rotation. life is the new lifetime; 0 keeps it.
func (w *world) resign(by *keyset.Record, life time.Duration, r *svidpb.BatchNewX509SVIDResponse_Result) {
	if r.Svid == nil {
		return
	}
	leaf, err := x509.ParseCertificate(r.Svid.CertChain[0])
	if err != nil {
		panic(err)
	}
	if life != 0 {
		leaf.NotAfter = time.Now().Add(life)
		r.Svid.ExpiresAt = leaf.NotAfter.Unix()
	}
	r.Svid.CertChain[0] = signWith(by, leaf, nil)
}

// record returns a stored keyset with its keys.
func (w *world) record(id string) *keyset.Record {
	doc, err := w.storage.Load(context.Background())
	w.check(err)
	i := slices.IndexFunc(doc.Records, func(r keyset.Record) bool { return r.ID == id })
	if i < 0 {
		w.t.Fatalf("no keyset %s", id)
	}
	return &doc.Records[i]
}

// unknown returns a keyset that is in no bundle.
func (w *world) unknown() *keyset.Record {
	w.t.Helper()
	_, err := keyset.Open(w.t.Context(), keyset.Config{TrustDomain: td, Storage: &w.unknownKeys})
	w.check(err)
	doc, err := w.unknownKeys.Load(w.t.Context())
	w.check(err)
	return &doc.Records[0]
}

func (w *world) mintsSince(t time.Time) []mint {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []mint
	for _, m := range w.mints {
		if !m.at.Before(t) {
			out = append(out, m)
		}
	}
	return out
}

// checkRate fails the test if the agent requested more than 20 SVIDs in any second.
func (w *world) checkRate(mints []mint) {
	w.t.Helper()
	var arrivals []time.Time
	for _, m := range mints {
		for range max(len(m.entries), 1) {
			arrivals = append(arrivals, m.at)
		}
	}
	for i := 20; i < len(arrivals); i++ {
		if d := arrivals[i].Sub(arrivals[i-20]); d < time.Second {
			w.t.Fatalf("21 taint renewals within %v", d)
		}
	}
}
