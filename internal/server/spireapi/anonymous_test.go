package spireapi_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/server/spireapi"
)

// records is a log whose lines a test can read.
type records struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (r *records) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.buf.Write(p)
}

func (r *records) logger() *slog.Logger { return slog.New(slog.NewJSONHandler(r, nil)) }

// take removes the lines of one message and returns them.
func (r *records) take(t *testing.T, message string) (out []map[string]any) {
	t.Helper()
	synctest.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	var rest strings.Builder
	for line := range strings.Lines(r.buf.String()) {
		var rec map[string]any
		check(t, json.Unmarshal([]byte(line), &rec))
		if rec["msg"] == message {
			out = append(out, rec)
		} else {
			rest.WriteString(line)
		}
	}
	r.buf.Reset()
	r.buf.WriteString(rest.String())
	return out
}

// total returns how many lines there would be without a limit: a line without a count stands
// for itself.
func total(lines []map[string]any) (n int) {
	for _, l := range lines {
		if count, ok := l["count"].(float64); ok {
			n += int(count)
		} else {
			n++
		}
	}
	return n
}

// workload returns a workload's identity.
func (r *running) workload(t *testing.T) *identity {
	t.Helper()
	key, _ := newKey(t)
	svid, err := r.Keysets().SignX509(spiffeid.RequireFromPath(td, "/workload"), key.Public(), 0)
	check(t, err)
	return newIdentity(t, &types.X509SVID{CertChain: [][]byte{svid.DER}, Id: &types.SPIFFEID{Path: "/workload"}}, key)
}

// TestRefusedBeforeTheRequestIsRead: the server does not read a request of an
// agent-only method from other callers. The clients here never send the request.
func TestRefusedBeforeTheRequestIsRead(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{Ledger: newFakeLedger()}, func(t *testing.T, s *running) {
		for _, caller := range []*identity{nil, s.workload(t)} {
			c := s.dial(t, caller)
			for _, method := range []string{
				agentv1.Agent_RenewAgent_FullMethodName, agentv1.Agent_PostStatus_FullMethodName,
				entryv1.Entry_GetAuthorizedEntries_FullMethodName, entryv1.Entry_SyncAuthorizedEntries_FullMethodName,
				svidv1.SVID_BatchNewX509SVID_FullMethodName, svidv1.SVID_NewJWTSVID_FullMethodName,
				bundlev1.Bundle_GetFederatedBundle_FullMethodName, api.Fleet_Report_FullMethodName,
			} {
				wantCode(t, silentCall(t, c, method), codes.PermissionDenied, notAttested)
			}
			for _, method := range []string{agentv1.Agent_CountAgents_FullMethodName, entryv1.Entry_BatchCreateEntry_FullMethodName, "/unknown.Service/Method"} {
				wantCode(t, silentCall(t, c, method), codes.Unimplemented)
			}
		}
	})
}

// silentCall begins a call, sends nothing and waits at most a second for its end.
func silentCall(t *testing.T, c *client, method string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	stream, err := c.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method)
	if err != nil {
		return err
	}
	return stream.RecvMsg(new(emptypb.Empty))
}

// TestAnonymousCalls: one address has at most four of them in flight, each for at
// most a minute. Agents at that address are not affected.
func TestAnonymousCalls(t *testing.T) {
	t.Parallel()
	seen := &counts{by: make(map[string]int)}
	bubble(t, spireapi.Config{Observer: seen}, func(t *testing.T, s *running) {
		caller, _ := s.join(t)
		at := s.from(t, "10.0.0.1")
		a, b := at.dial(t, nil), at.dial(t, s.workload(t))
		var streams []grpc.BidiStreamingClient[agentv1.AttestAgentRequest, agentv1.AttestAgentResponse]
		open := func(c *client) {
			t.Helper()
			stream, err := c.AttestAgent(t.Context())
			check(t, err)
			streams = append(streams, stream)
			synctest.Wait()
		}
		for _, c := range []*client{a, a, b, b} {
			open(c)
		}
		for _, c := range []*client{a, b} {
			_, err := c.GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
			wantCode(t, err, codes.ResourceExhausted)
			if !strings.Contains(err.Error(), "10.0.0.1/32") {
				t.Errorf("the error does not name the address: %v", err)
			}
		}
		if n := seen.limited("GetBundle"); n != 2 {
			t.Errorf("%d calls are counted as limited, want 2", n)
		}
		check(t, at.dial(t, caller).ping(t.Context()))
		_, err := s.from(t, "10.0.0.2").dial(t, nil).GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
		check(t, err)

		check(t, streams[0].CloseSend())
		_, _ = streams[0].Recv()
		synctest.Wait()
		open(b)
		begin := time.Now()
		_, err = streams[1].Recv() // never sends anything
		wantCode(t, err, codes.DeadlineExceeded)
		if d := time.Since(begin); d != time.Minute {
			t.Errorf("a call that sends nothing ends after %v", d)
		}
		_, err = a.GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
		check(t, err)
	})
}

// TestAnonymousCallsGiveWay: a call that has taken ten seconds, such as that of a caller
// who does not answer, ends for a new one of the same address.
func TestAnonymousCallsGiveWay(t *testing.T) {
	t.Parallel()
	seen := &counts{by: make(map[string]int)}
	bubble(t, spireapi.Config{Observer: seen}, func(t *testing.T, s *running) {
		at := s.from(t, "2001:db8:1::1")
		stranger, agent := at.dial(t, nil), at.dial(t, nil)
		bundle := func() error {
			_, err := agent.GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
			return err
		}
		check(t, bundle())
		var silent []grpc.BidiStreamingClient[agentv1.AttestAgentRequest, agentv1.AttestAgentResponse]
		for range 4 {
			stream, err := stranger.AttestAgent(t.Context())
			check(t, err)
			silent = append(silent, stream)
			synctest.Wait()
			time.Sleep(time.Second)
		}
		wantCode(t, bundle(), codes.ResourceExhausted)
		time.Sleep(6 * time.Second) // the first has had ten seconds, the others less
		check(t, bundle())
		_, err := silent[0].Recv()
		wantCode(t, err, codes.Canceled)
		if n := seen.limited("AttestAgent"); n < 1 {
			t.Errorf("%d evicted calls are counted", n)
		}
		check(t, bundle()) // in the place that is free now
		for _, stream := range silent[1:] {
			check(t, stream.CloseSend())
			_, err := stream.Recv()
			wantCode(t, err, codes.InvalidArgument)
		}
	})
}

// TestAnonymousCallsOfOneSite: all clients of a /48, of which there can be 65,536,
// have at most 32 calls in flight.
func TestAnonymousCallsOfOneSite(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{}, func(t *testing.T, s *running) {
		at := s.from(t, "2001:db8:2::1")
		other := at.dial(t, nil)
		bundle := func(c *client) error {
			_, err := c.GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
			return err
		}
		check(t, bundle(other))
		for i := range 8 {
			at.lis.from = &net.TCPAddr{IP: net.ParseIP(fmt.Sprintf("2001:db8:1:%x::1", i))}
			c := at.dial(t, nil)
			for range 4 {
				_, err := c.AttestAgent(t.Context())
				check(t, err)
			}
			synctest.Wait()
		}
		at.lis.from = &net.TCPAddr{IP: net.ParseIP("2001:db8:1:ffff::1")}
		wantCode(t, bundle(at.dial(t, nil)), codes.ResourceExhausted)
		check(t, bundle(other))
	})
}

// TestCallsOfOneAgent: at most 256 are in flight, over all its connections.
func TestCallsOfOneAgent(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{}, func(t *testing.T, s *running) {
		caller, _ := s.join(t)
		another, _ := s.join(t)
		s.apply(t, many(501))
		at := s.from(t, "10.0.0.1")
		for range 3 {
			c := at.dial(t, caller)
			for range 85 {
				receive(t, openSync(t, c, &entryv1.SyncAuthorizedEntriesRequest{}))
			}
		}
		c := at.dial(t, caller)
		receive(t, openSync(t, c, &entryv1.SyncAuthorizedEntriesRequest{}))
		wantCode(t, c.ping(t.Context()), codes.ResourceExhausted)
		check(t, at.dial(t, another).ping(t.Context()))
	})
}

// TestAnonymousConnections: one address has at most 16. Agents at that address are
// not affected.
func TestAnonymousConnections(t *testing.T) {
	t.Parallel()
	seen := &counts{by: make(map[string]int)}
	bubble(t, spireapi.Config{Observer: seen}, func(t *testing.T, s *running) {
		at := s.from(t, "10.0.0.1")
		bundle := func(c *client) error {
			_, err := c.GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
			return err
		}
		var all []*client
		for i := range 16 {
			var caller *identity
			if i%2 == 1 {
				caller = s.workload(t)
			}
			c := at.dial(t, caller)
			check(t, bundle(c))
			all = append(all, c)
		}
		err := bundle(at.dial(t, nil))
		wantCode(t, err, codes.Unavailable)
		if n := seen.limited("connect"); n != 1 {
			t.Errorf("%d refused connections are counted, want 1", n)
		}
		for range 5 {
			caller, _ := s.join(t)
			for range 4 {
				check(t, at.dial(t, caller).ping(t.Context()))
			}
		}
		for _, c := range all {
			check(t, bundle(c)) // on the connection that is open
		}
		check(t, all[0].Close())
		synctest.Wait()
		check(t, bundle(at.dial(t, nil)))
	})
}

// TestAnonymousBytes: an anonymous caller can send 256 KiB on one connection.
func TestAnonymousBytes(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{}, func(t *testing.T, s *running) {
		caller, _ := s.join(t)
		at := s.from(t, "10.0.0.1")
		large := func(c *client, size int) error {
			_, err := c.attest(t.Context(), "join_token", strings.Repeat("x", size), []byte("x"))
			return err
		}
		wantCode(t, large(at.dial(t, nil), 200<<10), codes.InvalidArgument)
		wantCode(t, large(at.dial(t, nil), 300<<10), codes.Unavailable)
		c := at.dial(t, nil)
		for range 5 {
			_ = large(c, 200<<10) // the second ends the connection, and gRPC reconnects
		}
		wantCode(t, large(at.dial(t, caller), 900<<10), codes.InvalidArgument)
	})
}

// TestRefusedCallsAreLogged: thousands of them are logged once a minute, with a count.
func TestRefusedCallsAreLogged(t *testing.T) {
	t.Parallel()
	log := new(records)
	bubble(t, spireapi.Config{Log: log.logger()}, func(t *testing.T, s *running) {
		c := s.from(t, "10.0.0.1").dial(t, nil)
		for range 2000 { // within what one connection can send
			wantCode(t, c.ping(t.Context()), codes.PermissionDenied, notAttested)
		}
		time.Sleep(time.Minute)
		lines := log.take(t, "call refused")
		if n := len(lines); n > 2 || total(lines) != 2000 {
			t.Errorf("%d lines that count %d calls, want 2 and 2000", n, total(lines))
		}
		if l := lines[0]; l["address"] != "10.0.0.1/32" || l["method"] != agentv1.Agent_PostStatus_FullMethodName || l["error"] == "" {
			t.Errorf("the log says %v", l)
		}
	})
}

// TestFieldsAreBounded: a request of many empty elements is small, and large once
// decoded. It is refused before it is decoded. A batch with a few items too many is
// refused by its method.
func TestFieldsAreBounded(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{}, func(t *testing.T, s *running) {
		_, c := s.join(t)
		for n, want := range map[int]codes.Code{4096: codes.ResourceExhausted, 4097: codes.Internal, 1 << 18: codes.Internal} {
			req := &svidv1.BatchNewX509SVIDRequest{Params: make([]*svidv1.NewX509SVIDParams, n)}
			for i := range req.Params {
				req.Params[i] = &svidv1.NewX509SVIDParams{}
			}
			_, err := c.BatchNewX509SVID(t.Context(), req)
			wantCode(t, err, want)
			if want == codes.Internal && !strings.Contains(err.Error(), "more than 4096 fields") {
				t.Errorf("%d items: %v", n, err)
			}
		}
	})
}
