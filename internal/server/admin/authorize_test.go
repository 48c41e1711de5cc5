package admin_test

import (
	"context"
	"net"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/operator/renewd"
	"github.com/renewd/renewd/internal/server/admin"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/test/memory"
)

const (
	service      = "/renewd.v1.Operator/"
	entryService = "/spire.api.server.entry.v1.Entry/"
)

// fullMethod returns the full name of a method; the names of SPIRE's begin with "SPIRE ".
func fullMethod(name string) string {
	if of, ok := strings.CutPrefix(name, "SPIRE "); ok {
		return entryService + of
	}
	return service + name
}

// spireMethods returns the methods of SPIRE's Entry service that are not for agents.
func spireMethods() (names []string) {
	for _, m := range entryv1.Entry_ServiceDesc.Methods {
		if m.MethodName != "GetAuthorizedEntries" {
			names = append(names, "SPIRE "+m.MethodName)
		}
	}
	return names
}

// changes reports by its name whether a method is for managers only.
func changes(method string) bool {
	for _, verb := range []string{"List", "Get", "Read", "Count"} {
		if strings.HasPrefix(strings.TrimPrefix(method, "SPIRE "), verb) {
			return false
		}
	}
	return true
}

// TestEveryMethodHasARole: the table has all methods of the service, and readers may call
// none that changes something.
func TestEveryMethodHasARole(t *testing.T) {
	t.Parallel()
	names := []string{"Backup"} // the one stream
	if n := len(api.Operator_ServiceDesc.Streams); n != 1 {
		t.Errorf("%d streams: only Backup is limited and logged", n)
	}
	for _, m := range api.Operator_ServiceDesc.Methods {
		names = append(names, m.MethodName)
	}
	names = append(names, spireMethods()...)
	for _, name := range names {
		want := admin.Reader
		if changes(name) {
			want = admin.Manager
		}
		if got := admin.Roles[fullMethod(name)]; got != want {
			t.Errorf("%s needs %v, want %v", name, got, want)
		}
	}
	if got, want := len(admin.Roles), len(names); got != want {
		t.Errorf("the table has %d methods, the services %d", got, want)
	}
}

// requests has a request for each method that has an effect if the caller may call it.
func requests(w *world) map[string]proto.Message {
	list := w.only().keysets.Status().Keysets
	return map[string]proto.Message{
		"ListDeployments": &api.ListDeploymentsRequest{}, "ListKeysets": &api.ListKeysetsRequest{},
		"ListHolders": &api.ListHoldersRequest{KeysetId: list[0].ID}, "ReadAudit": &api.ReadAuditRequest{},
		"ListAgents": &api.ListAgentsRequest{}, "ListEntries": &api.ListEntriesRequest{}, "GetBundle": &api.GetBundleRequest{},
		"GetClock": &api.GetClockRequest{},

		"RemoveKeyset":    &api.RemoveKeysetRequest{KeysetId: list[0].ID, Force: true},
		"ActivateKeyset":  &api.ActivateKeysetRequest{KeysetId: list[2].ID},
		"TaintKeyset":     &api.TaintKeysetRequest{KeysetId: list[3].ID},
		"PrepareKeyset":   &api.PrepareKeysetRequest{},
		"CreateJoinToken": &api.CreateJoinTokenRequest{Ttl: durationpb.New(time.Minute)},
		"BanAgent":        &api.BanAgentRequest{AgentId: agent("a").String()},
		"EvictAgent":      &api.EvictAgentRequest{AgentId: agent("a").String(), Gone: true},
		"ApplyEntries":    &api.ApplyEntriesRequest{},
		"PutEntry": &api.PutEntryRequest{Entry: &api.Entry{
			Id: "new", SpiffeId: workload.String(), Selectors: []*api.Selector{{Type: "unix", Value: "uid:1"}},
		}},
		"DeleteEntry": &api.DeleteEntryRequest{Id: "web"},

		"SPIRE CountEntries": &entryv1.CountEntriesRequest{}, "SPIRE ListEntries": &entryv1.ListEntriesRequest{},
		"SPIRE GetEntry":         &entryv1.GetEntryRequest{Id: "other"},
		"SPIRE BatchCreateEntry": &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{spireEntry("spire")}},
		"SPIRE BatchUpdateEntry": &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{{Id: "other", Hint: "x"}}, InputMask: &types.EntryMask{Hint: true}},
		"SPIRE BatchDeleteEntry": &entryv1.BatchDeleteEntryRequest{Ids: []string{"third"}},

		"ConfirmClock": &api.ConfirmClockRequest{Time: timestamppb.Now()},
	}
}

// populated returns a world in which each request has an effect: one tainted, one active and
// two prepared keysets, an agent and an entry.
func populated(t testing.TB) *world {
	t.Helper()
	return populate(t, newWorld(t))
}

func populate(t testing.TB, w *world) *world {
	t.Helper()
	d := w.only()
	d.tainted(t)
	for range 2 {
		_, err := d.keysets.Prepare(t.Context())
		check(t, err)
	}
	d.attest(t, spireapi.Agent{ID: agent("a"), Type: "join_token", Serial: "1", ExpiresAt: time.Now().Add(time.Hour)})
	var entries []spireapi.Entry
	for _, id := range []string{"web", "other", "third"} {
		entries = append(entries, spireapi.Entry{ID: id, SPIFFEID: workload, Selectors: []spireapi.Selector{{Type: "unix", Value: "uid:1000"}}})
	}
	_, err := d.server.ApplyEntries(t.Context(), entries, false)
	check(t, err)
	return w
}

// spireEntry returns an entry of an agent in SPIRE's form.
func spireEntry(id string, change ...func(*types.Entry)) *types.Entry {
	e := &types.Entry{
		Id: id, SpiffeId: &types.SPIFFEID{TrustDomain: td.Name(), Path: "/spire-" + id},
		ParentId:  &types.SPIFFEID{TrustDomain: td.Name(), Path: agent("a").Path()},
		Selectors: []*types.Selector{{Type: "unix", Value: "uid:1"}},
	}
	for _, f := range change {
		f(e)
	}
	return e
}

// state is all that operators can change.
type state struct {
	keysets []string
	agents  []spireapi.Agent
	tokens  int
	entries []spireapi.StoredEntry
	rows    int
	audit   int
}

func (w *world) state(t testing.TB) state {
	t.Helper()
	d := w.only()
	agents, err := d.server.Agents(t.Context())
	check(t, err)
	tokens, err := d.kept.Tokens(t.Context())
	check(t, err)
	return state{d.states(t), agents, len(tokens), d.server.Entries(), d.rows.count(), len(d.storage.records())}
}

// callAll calls each method once and returns the codes.
func callAll(t testing.TB, w *world, conn grpc.ClientConnInterface) map[string]codes.Code {
	t.Helper()
	out := make(map[string]codes.Code)
	reqs := requests(w)
	names := spireMethods() // before ApplyEntries, which removes all
	for _, m := range api.Operator_ServiceDesc.Methods {
		names = append(names, m.MethodName)
	}
	for _, name := range names {
		if reqs[name] == nil {
			t.Fatalf("no request of %s", name)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		err := conn.Invoke(ctx, fullMethod(name), reqs[name], new(emptypb.Empty))
		cancel()
		out[name] = status.Code(err)
		if err != nil && status.Convert(err).Message() == "" {
			t.Errorf("%s: an error without a message: %v", name, err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	data, err := received(ctx, conn)
	out["Backup"] = status.Code(err)
	if (err == nil) != (len(data) > 0) {
		t.Errorf("backup: %d bytes, %v", len(data), err)
	}
	return out
}

// TestAuthorization calls every method over mTLS as each kind of caller.
func TestAuthorization(t *testing.T) {
	t.Parallel()
	foreign := spiffeid.RequireTrustDomainFromString("elsewhere.example")
	for name, c := range map[string]struct {
		connect          func(t *testing.T, w *world, r *remote) *grpc.ClientConn
		reading, writing codes.Code
	}{
		"manager": {func(t *testing.T, w *world, r *remote) *grpc.ClientConn {
			return r.dial(t, w, w.only().sign(t, boss, time.Hour))
		}, codes.OK, codes.OK},
		"reader": {func(t *testing.T, w *world, r *remote) *grpc.ClientConn {
			return r.dial(t, w, w.only().sign(t, viewer, time.Hour))
		}, codes.OK, codes.PermissionDenied},
		"nobody": {func(t *testing.T, w *world, r *remote) *grpc.ClientConn {
			return r.dial(t, w, w.only().sign(t, workload, time.Hour))
		}, codes.PermissionDenied, codes.PermissionDenied},
		"one below a manager": {func(t *testing.T, w *world, r *remote) *grpc.ClientConn {
			return r.dial(t, w, w.only().sign(t, spiffeid.RequireFromPath(td, "/ops/boss/x"), time.Hour))
		}, codes.PermissionDenied, codes.PermissionDenied},
		"agent": {func(t *testing.T, w *world, r *remote) *grpc.ClientConn {
			return r.dial(t, w, w.only().sign(t, agent("a"), time.Hour))
		}, codes.PermissionDenied, codes.PermissionDenied},
		"without SVID": {func(t *testing.T, w *world, r *remote) *grpc.ClientConn {
			return r.dial(t, w, nil)
		}, codes.Unavailable, codes.Unavailable},
		"manager's path in another trust domain": {func(t *testing.T, w *world, r *remote) *grpc.ClientConn {
			other, err := keyset.Open(t.Context(), keyset.Config{TrustDomain: foreign, Storage: new(memory.Keysets)})
			check(t, err)
			return r.dial(t, w, sign(t, other, spiffeid.RequireFromPath(foreign, boss.Path()), time.Hour))
		}, codes.Unavailable, codes.Unavailable},
		"manager's ID by another authority": {func(t *testing.T, w *world, r *remote) *grpc.ClientConn {
			other, err := keyset.Open(t.Context(), keyset.Config{TrustDomain: td, Storage: new(memory.Keysets)})
			check(t, err)
			return r.dial(t, w, sign(t, other, boss, time.Hour))
		}, codes.Unavailable, codes.Unavailable},
		"manager whose SVID has expired": {func(t *testing.T, w *world, r *remote) *grpc.ClientConn {
			svid := w.only().sign(t, boss, time.Minute)
			time.Sleep(2 * time.Minute)
			return r.dial(t, w, svid)
		}, codes.Unavailable, codes.Unavailable},
		"manager whose SVID expires on the connection": {func(t *testing.T, w *world, r *remote) *grpc.ClientConn {
			conn := r.dial(t, w, w.only().sign(t, boss, time.Minute))
			check(t, conn.Invoke(t.Context(), service+"ListKeysets", &api.ListKeysetsRequest{}, new(emptypb.Empty)))
			time.Sleep(time.Minute + time.Second)
			return conn
		}, codes.Unauthenticated, codes.Unauthenticated},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := populated(t)
				r := w.serveTLS(t)
				conn := c.connect(t, w, r)
				before := w.state(t)
				for method, got := range callAll(t, w, conn) {
					want := c.reading
					if changes(method) {
						want = c.writing
					}
					// A manager's call may fail because of the one before.
					allowed := want == codes.OK && (got == codes.FailedPrecondition || got == codes.NotFound)
					if got != want && !allowed {
						t.Errorf("%s: %v, want %v", method, got, want)
					}
				}
				if after := w.state(t); c.writing != codes.OK && !reflect.DeepEqual(before, after) {
					t.Errorf("the state was\n%+v\nand is\n%+v", before, after)
				} else if c.writing == codes.OK && after.audit < before.audit+4 {
					t.Errorf("a manager made %d changes of keysets", after.audit-before.audit)
				}
			})
		})
	}
}

// TestUnknownMethods: methods that the service does not have are rejected for managers, too.
func TestUnknownMethods(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		conn := w.serveTLS(t).dial(t, w, w.only().sign(t, boss, time.Hour))
		for _, method := range []string{
			service + "Other", "/renewd.v1.Fleet/Report", "/spire.api.server.agent.v1.Agent/AttestAgent", "/grpc.health.v1.Health/Check",
		} {
			if err := conn.Invoke(t.Context(), method, &emptypb.Empty{}, new(emptypb.Empty)); status.Code(err) != codes.PermissionDenied {
				t.Errorf("%s: %v", method, err)
			}
			stream, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method)
			check(t, err)
			if err := stream.RecvMsg(new(emptypb.Empty)); status.Code(err) != codes.PermissionDenied {
				t.Errorf("stream %s: %v", method, err)
			}
		}
	})
}

// TestRejectedBeforeRequestIsRead: a caller without a role cannot make the server hold a
// large request. The client here never sends one.
func TestRejectedBeforeRequestIsRead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		conn := w.serveTLS(t).dial(t, w, w.only().sign(t, workload, time.Hour))
		stream, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true}, service+"ApplyEntries")
		check(t, err)
		err = stream.RecvMsg(new(emptypb.Empty))
		if want := workload.String() + " is not in operators.managers"; status.Code(err) != codes.PermissionDenied || status.Convert(err).Message() != want {
			t.Errorf("got %v, want %s", err, want)
		}
		synctest.Wait()
		got := w.log.lines(t, "operator call rejected")
		if len(got) != 1 || got[0]["actor"] != workload.String() || got[0]["method"] != service+"ApplyEntries" {
			t.Errorf("log: %v", got)
		}
	})
}

// TestBundleOfTheConnection: after an authority is removed, SVIDs that it signed cannot
// connect, and existing connections end within minutes.
func TestBundleOfTheConnection(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		r := w.serveTLS(t)
		svid := w.only().sign(t, boss, 24*time.Hour)
		c := renewd.NewClient(r.dial(t, w, svid))
		old := w.only().keysets.Active()
		b := c.Backend("", "")
		next, err := b.Prepare(t.Context())
		check(t, err)
		check(t, b.Activate(t.Context(), next.ID))
		again := r.dial(t, w, svid)
		check(t, b.Taint(t.Context(), old.ID))
		check(t, b.Remove(t.Context(), old.ID, false))

		err = again.Invoke(t.Context(), service+"ListKeysets", &api.ListKeysetsRequest{}, new(emptypb.Empty))
		if status.Code(err) != codes.Unavailable {
			t.Errorf("a new connection: %v", err)
		}
		if _, err := b.Status(t.Context()); err != nil {
			t.Errorf("existing connection: %v", err)
		}
		time.Sleep(4 * time.Minute)
		if _, err := b.Status(t.Context()); err == nil {
			t.Error("the existing connection still works")
		}
	})
}

// TestSilentConnections: connections that send nothing do not delay the shutdown.
func TestSilentConnections(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		r := w.serveTLS(t)
		silent, err := r.lis.DialContext(t.Context())
		check(t, err)
		defer silent.Close()
		synctest.Wait()
		begin := time.Now()
		check(t, r.stop())
		if took := time.Since(begin); took > 2*time.Second {
			t.Errorf("the end took %v", took)
		}
	})
}

// TestManyConnections: thousands of connections that send nothing do not block an operator.
// Callers without a role have 16 connections and 4 calls per address.
func TestManyConnections(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		r := w.serveOn(t, &crowd{Listener: bufconn.Listen(1 << 20), size: 5000, from: &net.TCPAddr{IP: net.IPv4(10, 0, 0, 1)}})
		begin := time.Now()
		manager := r.as(t, w, boss)
		list := func() error {
			_, err := manager.ListKeysets(t.Context(), &api.ListKeysetsRequest{})
			return err
		}
		check(t, list())
		if took := time.Since(begin); took != 0 {
			t.Errorf("a manager waits for %v", took)
		}
		nobody := func() error {
			err := r.dial(t, w, w.only().sign(t, workload, time.Hour)).Invoke(t.Context(), service+"ListKeysets", &api.ListKeysetsRequest{}, new(emptypb.Empty))
			return err
		}
		for range 16 {
			if err := nobody(); status.Code(err) != codes.PermissionDenied {
				t.Errorf("caller without a role: %v", err)
			}
		}
		if err := nobody(); status.Code(err) != codes.Unavailable {
			t.Errorf("caller without a role, on one connection more: %v", err)
		}
		check(t, list())
		again := r.as(t, w, boss)
		_, err := again.ListKeysets(t.Context(), &api.ListKeysetsRequest{})
		check(t, err)
		if lines := w.log.lines(t, "operator connection or call rejected by limits"); len(lines) != 1 || lines[0]["address"] != "10.0.0.1/32" {
			t.Errorf("log: %v", lines)
		}
	})
}

// crowd is a listener that first accepts a number of connections that send nothing, then
// those of its inner listener. All come from one address.
type crowd struct {
	*bufconn.Listener
	from net.Addr
	size int
}

func (c *crowd) Accept() (conn net.Conn, err error) {
	if c.size > 0 {
		c.size--
		conn, _ = net.Pipe()
	} else if conn, err = c.Listener.Accept(); err != nil {
		return nil, err
	}
	return connFrom{conn, c.from}, nil
}

type connFrom struct {
	net.Conn
	from net.Addr
}

func (c connFrom) RemoteAddr() net.Addr { return c.from }

// TestNotAUnixSocket: the kernel cannot identify a caller on another kind of socket.
func TestNotAUnixSocket(t *testing.T) {
	t.Parallel()
	w := newWorldFor(t, nil, nil)
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	address := lis.Addr().String()
	serveUnix(t, w, lis)
	conn, err := grpc.NewClient(address, renewd.DialOptions(insecure.NewCredentials())...)
	check(t, err)
	defer conn.Close()
	for method, code := range callAll(t, populate(t, w), conn) {
		if code != codes.Unavailable {
			t.Errorf("%s: %v", method, code)
		}
	}
}
