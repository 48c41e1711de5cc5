// Package admin is what operators do with the signing server, over the
// wire: the Operator service of package api, and who may call it.
//
// The service is reached at the admin socket, where the kernel says which user
// calls, and over mTLS, where an X.509-SVID of the trust domain does. [Rules]
// give users and SPIFFE IDs a role; each method takes one; a method that is
// not in the table takes none and is refused. Who asked for a mutation is in the
// audit log.
package admin

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strconv"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/listen"
	"github.com/renewd/renewd/internal/refusal"
	"github.com/renewd/renewd/internal/server/detach"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/ledger"
	"github.com/renewd/renewd/internal/server/spireapi"
)

// Deployment is one that operators may work on.
type Deployment struct {
	Name string
	// Retired: agents cannot reach it any more, so none of them is waited for.
	Retired bool
	Keysets *keyset.Deployment
	Server  *spireapi.Server
	Ledger  *ledger.Ledger
	// Audit returns the log of mutations with a number above after, at most
	// limit; nil when none is kept.
	Audit func(ctx context.Context, after uint64, limit int) ([]AuditRecord, error)
	// Automatic says what automatic rotation is about to do; nil when there is
	// none.
	Automatic func() Automatic
}

// AuditRecord is one mutation, numbered from 1 without a gap.
type AuditRecord struct {
	Number uint64
	keyset.Change
}

// Automatic is what automatic rotation is about to do.
type Automatic struct {
	Mode     string    // off, on or paused
	Next     string    // such as "taint ks_…"; empty: nothing
	At       time.Time // where WaitsFor is set: at the latest
	WaitsFor string    // why it is not done yet, where time is not the reason
}

// Config is what a [Service] needs. TrustDomain, Deployments and Published are
// required.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	Deployments []Deployment
	// Published returns the trust bundle of all deployments.
	Published func() *keyset.Bundle
	// Follows reports whether the bundle of another trust domain is fetched, so that
	// who enters an entry that federates with it can be told; nil: it is not known.
	Follows func(spiffeid.TrustDomain) bool
	// Backup writes a copy of what all deployments keep to w and returns its size
	// in bytes; nil when nothing is kept.
	Backup func(ctx context.Context, w io.Writer) (size int64, err error)
	// Certificate is what remote operators are shown; ServeTLS needs it.
	Certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)
	Rules       Rules
	// Connections is where the connections of every Serve count, too; each has a
	// bound of its own when nil.
	Connections *listen.Pool
	// Options are added to every gRPC server.
	Options []grpc.ServerOption
	Log     *slog.Logger // discards when nil
	// Clock is one of the machine's, of which nothing is known, when nil. ConfirmClock
	// confirms it durably and reports whether it showed about that time; only in memory
	// when nil. Heard is told what the clock of a remote operator showed at a call; nobody
	// when nil.
	Clock        *clock.Clock
	ConfirmClock func(ctx context.Context, at time.Time) (bool, error)
	Heard        func(actor string, sentAt time.Time)
}

// Service answers operators. All methods may be called concurrently.
type Service struct {
	api.UnimplementedOperatorServer
	config Config
	rules  Rules
	log    *slog.Logger
	lines  *listen.Lines
	now    func() time.Time
	calls  detach.Group
}

// Wait returns when no call waits for storage any more. It is for who has closed that.
func (s *Service) Wait() { s.calls.Wait() }

// New makes a Service.
func New(c Config) (*Service, error) {
	if c.TrustDomain.IsZero() || len(c.Deployments) == 0 || c.Published == nil {
		return nil, errors.New("new operator service: it needs a trust domain, deployments and the published bundle")
	}
	if c.Clock == nil {
		c.Clock = clock.New(nil, nil, time.Time{})
	}
	if c.ConfirmClock == nil {
		c.ConfirmClock = func(_ context.Context, at time.Time) (bool, error) { return c.Clock.Confirm(at), nil }
	}
	if c.Heard == nil {
		c.Heard = func(string, time.Time) {}
	}
	s := &Service{config: c, rules: c.Rules, log: c.Log, now: c.Clock.Now}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.lines = listen.NewLines(s.log)
	return s, nil
}

// scoped is a request that names a deployment.
type scoped interface{ GetScope() *api.Scope }

// find returns the deployment that a request means.
func (s *Service) find(req scoped) (*Deployment, error) {
	scope := req.GetScope()
	if err := s.checkTrustDomain(scope.GetTrustDomain()); err != nil {
		return nil, err
	}
	name := scope.GetDeployment()
	if name == "" && len(s.config.Deployments) == 1 {
		return &s.config.Deployments[0], nil
	}
	for i := range s.config.Deployments {
		if s.config.Deployments[i].Name == name {
			return &s.config.Deployments[i], nil
		}
	}
	var names []string
	for _, d := range s.config.Deployments {
		names = append(names, d.Name)
	}
	if name == "" {
		return nil, status.Errorf(codes.InvalidArgument, "there are several deployments, %q: name one of them", names)
	}
	return nil, status.Errorf(codes.NotFound, "there is no deployment %q, only %q", name, names)
}

func (s *Service) checkTrustDomain(name string) error {
	if name != "" && name != s.config.TrustDomain.Name() {
		return status.Errorf(codes.NotFound, "this is the server of trust domain %q, not of %q", s.config.TrustDomain.Name(), name)
	}
	return nil
}

// ListDeployments implements the service. One that is not served any more is left
// out: it needs no keyset that signs, and by its name it is found all the same.
func (s *Service) ListDeployments(_ context.Context, req *api.ListDeploymentsRequest) (*api.ListDeploymentsResponse, error) {
	if err := s.checkTrustDomain(req.GetTrustDomain()); err != nil {
		return nil, err
	}
	resp := &api.ListDeploymentsResponse{TrustDomain: s.config.TrustDomain.Name()}
	for _, d := range s.config.Deployments {
		if !d.Retired {
			resp.Deployments = append(resp.Deployments, d.Name)
		}
	}
	return resp, nil
}

// PrepareKeyset implements the service.
func (s *Service) PrepareKeyset(ctx context.Context, req *api.PrepareKeysetRequest) (*api.PrepareKeysetResponse, error) {
	d, err := s.find(req)
	if err != nil {
		return nil, err
	}
	k, err := d.Keysets.Prepare(ctx)
	if err != nil {
		return nil, fail(err)
	}
	return &api.PrepareKeysetResponse{Keyset: protoKeyset(d.hanging(k))}, nil
}

// ActivateKeyset implements the service.
func (s *Service) ActivateKeyset(ctx context.Context, req *api.ActivateKeysetRequest) (*api.ActivateKeysetResponse, error) {
	d, err := s.find(req)
	if err != nil {
		return nil, err
	}
	if err := d.Keysets.Activate(ctx, req.GetKeysetId()); err != nil {
		return nil, fail(err)
	}
	return &api.ActivateKeysetResponse{}, nil
}

// TaintKeyset implements the service.
func (s *Service) TaintKeyset(ctx context.Context, req *api.TaintKeysetRequest) (*api.TaintKeysetResponse, error) {
	d, err := s.find(req)
	if err != nil {
		return nil, err
	}
	if err := d.Keysets.Taint(ctx, req.GetKeysetId()); err != nil {
		return nil, fail(err)
	}
	return &api.TaintKeysetResponse{}, nil
}

// RemoveKeyset implements the service. What is not safe is refused for the sake
// of X.509-SVIDs only. Agents replace JWT-SVIDs when their key is gone and not
// before, so there is nothing to wait for but their end: whether to do that is
// the operator's choice, and ListKeysets says when it is.
func (s *Service) RemoveKeyset(ctx context.Context, req *api.RemoveKeysetRequest) (*api.RemoveKeysetResponse, error) {
	d, err := s.find(req)
	if err != nil {
		return nil, err
	}
	if req.GetForce() {
		ctx = keyset.WithNote(ctx, d.forced(req.GetKeysetId()))
	}
	var gone keyset.Keyset
	err = d.Keysets.Remove(ctx, req.GetKeysetId(), func(all []keyset.Keyset) error {
		gone = all[slices.IndexFunc(all, func(k keyset.Keyset) bool { return k.ID == req.GetKeysetId() })]
		if h := d.Ledger.X509(gone.X509AuthorityID, true); !h.Clear && !req.GetForce() {
			return notSafe(gone.ID, h, s.countsLonger())
		}
		return nil
	})
	if err != nil {
		return nil, fail(err)
	}
	// It is done: that the caller may be gone by now must not leave this undone.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), tidyTime)
	defer cancel()
	if err := d.Ledger.Removed(ctx, gone.X509AuthorityID, gone.JWTKeyID); err != nil {
		// The rows that stay expire by themselves, and nobody asks for them.
		s.log.Warn("the ledger still has rows of a removed keyset", "deployment", d.Name, "keyset", gone.ID, "error", err)
	}
	return &api.RemoveKeysetResponse{}, nil
}

// tidyTime is how long the answer to a removal waits for the ledger to forget
// the keyset.
const tidyTime = 5 * time.Second

// forced is the audit log's note of a removal by force.
func (d *Deployment) forced(id string) string {
	for _, k := range d.Keysets.Status().Keysets {
		if h := d.Ledger.X509(k.X509AuthorityID, k.State == keyset.Tainted); k.ID == id && !h.Clear {
			return "forced: " + holds(h)
		}
	}
	return "forced, though nothing hung on it"
}

// holds says what is out of an authority.
func holds(h ledger.Holding) string {
	if !h.UnknownUntil.IsZero() {
		text := fmt.Sprintf("the server was restored from a copy of %s UTC; what was signed since is not known and may be in use until %s UTC",
			h.UnknownSince.UTC().Format(time.DateTime), h.UnknownUntil.UTC().Format(time.DateTime))
		if h.SVIDs > 0 {
			text += "; " + counted(h.SVIDs, "X.509-SVID") + " that it knows of may be, too"
		}
		return text
	}
	text := counted(h.SVIDs, "X.509-SVID")
	if h.Agents > 0 {
		text += " of " + counted(h.Agents, "agent")
	}
	text += " may still be in use"
	if !h.Latest.IsZero() {
		text += ", the last of them until " + h.Latest.UTC().Format(time.DateTime) + " UTC"
	}
	return text
}

func counted(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return strconv.Itoa(n) + " " + noun + "s"
}

func notSafe(id string, h ledger.Holding, more string) error {
	st := status.Newf(codes.FailedPrecondition, "keyset %s is not safe to remove: %s%s", id, holds(h), more)
	if detailed, err := st.WithDetails(&errdetails.ErrorInfo{Reason: api.ReasonNotSafe, Domain: api.ErrorDomain, Metadata: map[string]string{
		"svids": strconv.Itoa(h.SVIDs), "agents": strconv.Itoa(h.Agents),
	}}); err == nil {
		st = detailed
	}
	return st.Err()
}

// fail turns an error into the status that the caller gets.
func fail(err error) error {
	if _, ok := status.FromError(err); ok {
		return err
	}
	if refused, ok := errors.AsType[refusal.Error](err); ok {
		code := codes.FailedPrecondition
		switch refused {
		case refusal.ErrNotFound:
			code = codes.NotFound
		case refusal.ErrBusy:
			code = codes.Aborted
		}
		return status.Error(code, refused.Error())
	}
	if entry, ok := errors.AsType[*spireapi.EntryError](err); ok {
		return status.Error(codes.InvalidArgument, entry.Error())
	}
	if removal, ok := errors.AsType[removalError](err); ok {
		return status.Error(codes.FailedPrecondition, removal.Error())
	}
	switch {
	case errors.Is(err, spireapi.ErrNotFound):
		return status.Error(codes.NotFound, err.Error())
	case errors.Is(err, context.DeadlineExceeded):
		return status.Errorf(codes.DeadlineExceeded, "not known to be done in time: %v", err)
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, err.Error())
	}
	// Whoever gets to see it may manage or read the server's state anyway.
	return status.Error(codes.Internal, err.Error())
}
