package system_test

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
)

type streamsKey struct{}

// streams are FetchX509SVID streams without a client library. They record what a library
// would hide: ends of streams, missing SVIDs and invalid ones.
type streams struct {
	cancel []context.CancelFunc
	work   sync.WaitGroup

	mu       sync.Mutex
	all      []*stream
	released map[string]bool // IDs that may disappear
	answers  int
	faults   []error
}

// stream has the last answer of a stream.
type stream struct {
	socket string
	ids    map[string]bool
	gone   map[string]bool // IDs that have disappeared
	trusts map[string]int  // X.509 authorities, by trust domain
	until  time.Time       // expiry of the first of its SVIDs
	// The X.509 authorities that signed its SVIDs, by the key ID in hex.
	signers map[string]bool
}

// start opens n streams at each socket and waits for the first answer of each.
func (s *streams) start(n int, sockets []string) error {
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = append(s.cancel, cancel)
	for _, socket := range sockets {
		for range n {
			conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
			if err != nil {
				return err
			}
			st := &stream{socket: socket, gone: make(map[string]bool)}
			s.all = append(s.all, st)
			s.work.Go(func() {
				defer conn.Close()
				s.read(metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true"), conn, st)
			})
		}
	}
	return s.wait("a first answer", time.Minute, func(st *stream) bool { return st.ids != nil })
}

// read records the answers of a stream, and reopens it when it ends.
func (s *streams) read(ctx context.Context, conn *grpc.ClientConn, st *stream) {
	for ctx.Err() == nil {
		err := func() error {
			stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(ctx, &workload.X509SVIDRequest{}, grpc.WaitForReady(true))
			if err != nil {
				return err
			}
			for {
				answer, err := stream.Recv()
				if err != nil {
					return err
				}
				s.record(st, answer)
			}
		}()
		s.mu.Lock()
		if st.ids != nil && ctx.Err() == nil {
			s.faults = append(s.faults, fmt.Errorf("%s: a stream ended: %w", st.socket, err))
		}
		s.mu.Unlock()
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func (s *streams) record(st *stream, answer *workload.X509SVIDResponse) {
	now := time.Now()
	ids, trusts, signers := make(map[string]bool), make(map[string]int), make(map[string]bool)
	var until time.Time
	var invalid []error
	for _, svid := range answer.GetSvids() {
		ids[svid.GetSpiffeId()] = true
		trusts[trustDomain(svid.GetSpiffeId())] = count(svid.GetBundle())
		chain, err := valid(svid, now)
		if err != nil {
			invalid = append(invalid, err)
			continue
		}
		signers[hex.EncodeToString(chain[len(chain)-1].AuthorityKeyId)] = true
		if end := chain[0].NotAfter; until.IsZero() || end.Before(until) {
			until = end
		}
	}
	for td, bundle := range answer.GetFederatedBundles() {
		trusts[trustDomain(td)] = count(bundle)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	fault := func(what, id string) {
		s.faults = append(s.faults, fmt.Errorf("%s: a stream %s %s at %s", st.socket, what, id, now.Format(time.TimeOnly)))
	}
	s.answers++
	if st.ids != nil && now.After(st.until) {
		fault("was left with an SVID that expired at", st.until.Format(time.TimeOnly))
	}
	for _, err := range invalid {
		fault("got", err.Error())
	}
	for id := range st.ids {
		if ids[id] {
			continue
		}
		if st.gone[id] = true; !s.released[id] {
			fault("lost", id)
		}
	}
	for id := range ids {
		if st.gone[id] && s.released[id] {
			fault("got again", id)
		}
	}
	st.ids, st.trusts, st.until, st.signers = ids, trusts, until, signers
}

// valid verifies an SVID with the trust bundle of the same answer, as workloads do, and
// returns its certificates.
func valid(svid *workload.X509SVID, now time.Time) ([]*x509.Certificate, error) {
	held, err := x509svid.ParseRaw(svid.GetX509Svid(), svid.GetX509SvidKey())
	if err != nil {
		return nil, err
	}
	bundle, err := x509bundle.ParseRaw(held.ID.TrustDomain(), svid.GetBundle())
	if err != nil {
		return nil, err
	}
	if _, _, err := x509svid.Verify(held.Certificates, bundle, x509svid.WithTime(now)); err != nil {
		return nil, err
	}
	return held.Certificates, nil
}

func trustDomain(id string) string {
	td, _, _ := strings.Cut(strings.TrimPrefix(id, "spiffe://"), "/")
	return td
}

// count returns the number of certificates in concatenated DER, -1 for invalid DER.
func count(der []byte) int {
	certs, err := x509.ParseCertificates(der)
	if err != nil {
		return -1
	}
	return len(certs)
}

// wait returns when ok returns true for every stream.
func (s *streams) wait(what string, limit time.Duration, ok func(*stream) bool) error {
	for deadline := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		s.mu.Lock()
		i := slices.IndexFunc(s.all, func(st *stream) bool { return !ok(st) })
		if i < 0 {
			s.mu.Unlock()
			return nil
		}
		if time.Now().After(deadline) {
			defer s.mu.Unlock()
			st := s.all[i]
			return errors.Join(append(s.faults, fmt.Errorf("not every stream has %s within %v; one at %s has %v and trusts %v",
				what, limit, st.socket, slices.Sorted(maps.Keys(st.ids)), st.trusts))...)
		}
		s.mu.Unlock()
	}
}

func (s *streams) stop() {
	for _, cancel := range s.cancel {
		cancel()
	}
	s.work.Wait()
}

// waitLimit is the longest wait. Some steps are slow by design: for minutes after its
// attestation an agent still serves an entry that is missing.
const waitLimit = 5 * time.Minute

// followStreams is the command "streams". "start N SOCKET..." opens N streams at each
// agent's socket. After it
//
//	streams have SOCKET ID...           wait until the streams at a socket have these SPIFFE IDs
//	streams lack SOCKET ID...           wait until they have none of them
//	streams trust SOCKET TD N [LIMIT]   wait until they have N X.509 authorities of a trust domain
//	streams release ID...               these SPIFFE IDs may disappear from now on, once
//	streams free AUTHORITY              no stream has an SVID that this X.509 authority signed; with ! one has
//	streams whole                       no stream has ended, none has lost a SPIFFE ID that was not released,
//	                                    none got a released one again, and each had valid SVIDs all the time
func followStreams(ts *testscript.TestScript, neg bool, args []string) {
	s := ts.Value(streamsKey{}).(*streams)
	usage := func() {
		ts.Fatalf("usage: streams start N SOCKET... | have|lack SOCKET ID... | trust SOCKET TD N [LIMIT] | release ID... | free AUTHORITY | whole")
	}
	if len(args) == 0 {
		usage()
	}
	verb, args := args[0], args[1:]
	// at waits for the streams at one socket.
	begin := time.Now()
	at := func(what string, limit time.Duration, ok func(*stream) bool) {
		ts.Check(s.wait(what, limit, func(st *stream) bool { return st.socket != args[0] || ok(st) }))
		ts.Logf("after %v", time.Since(begin).Round(10*time.Millisecond))
	}
	switch {
	case verb == "start" && len(args) > 1:
		n, err := strconv.Atoi(args[0])
		ts.Check(err)
		ts.Check(s.start(n, args[1:]))
	case verb == "have" && len(args) > 1:
		at(strings.Join(args[1:], " and "), waitLimit, func(st *stream) bool {
			return !slices.ContainsFunc(args[1:], func(id string) bool { return !st.ids[id] })
		})
	case verb == "lack" && len(args) > 1:
		at("none of "+strings.Join(args[1:], " and "), waitLimit, func(st *stream) bool {
			return !slices.ContainsFunc(args[1:], func(id string) bool { return st.ids[id] })
		})
	case verb == "trust" && (len(args) == 3 || len(args) == 4):
		n, err := strconv.Atoi(args[2])
		ts.Check(err)
		limit := waitLimit
		if len(args) == 4 {
			limit, err = time.ParseDuration(args[3])
			ts.Check(err)
		}
		at(args[2]+" authorities of "+args[1], limit, func(st *stream) bool { return st.trusts[args[1]] == n })
	case verb == "release" && len(args) > 0:
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, id := range args {
			s.released[id] = true
		}
	case verb == "free" && len(args) == 1:
		s.mu.Lock()
		defer s.mu.Unlock()
		i := slices.IndexFunc(s.all, func(st *stream) bool { return st.signers[args[0]] })
		switch {
		case i >= 0 && !neg:
			ts.Fatalf("a stream at %s has an SVID of %s", s.all[i].socket, args[0])
		case i < 0 && neg:
			ts.Fatalf("no stream has an SVID of %s", args[0])
		}
	case verb == "whole" && len(args) == 0:
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, st := range s.all {
			if now := time.Now(); now.After(st.until) {
				s.faults = append(s.faults, fmt.Errorf("%s: a stream is left with an SVID that expired at %s", st.socket, st.until.Format(time.TimeOnly)))
			}
		}
		ts.Check(errors.Join(s.faults...))
		ts.Logf("%d streams had %d answers, and a valid SVID at every moment", len(s.all), s.answers)
	default:
		usage()
	}
}
