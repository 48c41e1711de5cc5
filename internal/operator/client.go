package operator

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"time"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/runbook"
)

// Client is a connection to the operators' API. Its calls are never retried.
type Client struct {
	api.OperatorClient
	conn   *grpc.ClientConn
	source io.Closer // nil at the admin socket
}

// noRetries: a mutation that may have happened is the operator's to judge.
var noRetries = []grpc.DialOption{grpc.WithDisableRetry(), grpc.WithDisableServiceConfig()}

// DialSocket connects to the admin socket at path.
func DialSocket(path string) (*Client, error) {
	conn, err := grpc.NewClient("unix:"+path, append(noRetries, grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	if err != nil {
		return nil, fmt.Errorf("admin socket %s: %w", path, err)
	}
	return &Client{OperatorClient: api.NewOperatorClient(conn), conn: conn}, nil
}

// serverPath is the path of the signing server's SPIFFE ID.
const serverPath = "/spire/server"

// DialServer connects to a server at host:port with the SVID that the Workload
// API at socket gives this process. The server must be that of the SVID's trust
// domain. It waits for the SVID until ctx is done.
func DialServer(ctx context.Context, address, socket string) (*Client, error) {
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(socket)))
	if err != nil {
		return nil, fmt.Errorf("get an SVID from the Workload API at %s: %w", socket, err)
	}
	own, err := source.GetX509SVID()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("get an SVID from the Workload API at %s: %w", socket, err), source.Close())
	}
	id, err := spiffeid.FromPath(own.ID.TrustDomain(), serverPath)
	if err != nil {
		return nil, errors.Join(err, source.Close())
	}
	creds := credentials.NewTLS(tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(id)))
	conn, err := grpc.NewClient(address, append(noRetries, grpc.WithTransportCredentials(creds))...)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("server %s: %w", address, err), source.Close())
	}
	return &Client{OperatorClient: api.NewOperatorClient(conn), conn: conn, source: source}, nil
}

// Close ends the connection.
func (c *Client) Close() error {
	err := c.conn.Close()
	if c.source != nil {
		err = errors.Join(err, c.source.Close())
	}
	return err
}

// Backend makes a deployment of the server what the runbook's commands work on.
// Empty names mean the server's own trust domain and its only deployment.
func (c *Client) Backend(trustDomain, deployment string) runbook.Backend {
	return &backend{c: c.OperatorClient, scope: &api.Scope{TrustDomain: trustDomain, Deployment: deployment}}
}

type backend struct {
	c     api.OperatorClient
	scope *api.Scope
}

// Status implements runbook.Backend.
func (b *backend) Status(ctx context.Context) (runbook.Status, error) {
	resp, err := b.c.ListKeysets(ctx, &api.ListKeysetsRequest{Scope: b.scope})
	if err != nil {
		return runbook.Status{}, plain(err)
	}
	s := runbook.Status{
		TrustDomain: resp.GetScope().GetTrustDomain(), Deployment: resp.GetScope().GetDeployment(),
		Sequence: resp.GetSequence(), Agents: int(resp.GetAgents()), AgentsBehind: int(resp.GetAgentsBehind()),
		Automatic: automatic(resp.GetAutomatic()),
	}
	for _, k := range resp.GetKeysets() {
		s.Keysets = append(s.Keysets, fromProto(k))
	}
	return s, nil
}

// automatic puts what automatic rotation is about to do into words; empty where
// it does nothing.
func automatic(a *api.Automatic) string {
	switch {
	case a == nil || a.GetMode() == "off" || a.GetMode() == "":
		return ""
	case a.GetNext() == "":
		return a.GetMode() + ", nothing to do"
	}
	text := a.GetMode() + ", next: " + a.GetNext()
	switch at := a.GetAt().AsTime(); {
	case a.GetWaitsFor() != "":
		text += ", waits for " + a.GetWaitsFor()
	case a.GetAt() != nil:
		text += " at " + at.UTC().Format(time.DateTime) + " UTC"
	}
	return text
}

var stateNames = map[api.KeysetState]runbook.State{
	api.KeysetState_PREPARED: runbook.Prepared, api.KeysetState_ACTIVE: runbook.Active, api.KeysetState_TAINTED: runbook.Tainted,
}

func fromProto(k *api.Keyset) runbook.Keyset {
	return runbook.Keyset{
		ID: k.GetId(), State: stateNames[k.GetState()], IssuedAt: instant(k.GetIssuedAt()), ExpiresAt: instant(k.GetExpiresAt()),
		X509AuthorityID: k.GetX509AuthorityId(), JWTKeyID: k.GetJwtKeyId(),
		SteppedDown: k.GetSteppedDownAt() != nil, TaintedAt: instant(k.GetTaintedAt()),
		X509SVIDs: int(k.GetLiveX509Svids()), JWTExpiry: instant(k.GetJwtLatestExpiry()),
		X509Safe: k.GetX509Safe(), JWTSafe: k.GetJwtSafe(),
	}
}

func instant(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

// Holders implements runbook.Backend.
func (b *backend) Holders(ctx context.Context, id string) ([]runbook.Holder, error) {
	resp, err := b.c.ListHolders(ctx, &api.ListHoldersRequest{Scope: b.scope, KeysetId: id})
	if err != nil {
		return nil, plain(err)
	}
	var out []runbook.Holder
	for _, h := range resp.GetHolders() {
		out = append(out, runbook.Holder{
			Agent: h.GetAgentId(), Version: h.GetVersion(), SVIDs: int(h.GetSvids()), Streams: int(h.GetStreams()), Reason: h.GetReason(),
			LatestExpiry: instant(h.GetLatestExpiry()), LastReport: instant(h.GetLastReport()), BeginsAt: instant(h.GetBeginsAt()), Rate: h.GetRate(),
		})
	}
	return out, nil
}

// Prepare implements runbook.Backend.
func (b *backend) Prepare(ctx context.Context) (runbook.Keyset, error) {
	resp, err := b.c.PrepareKeyset(ctx, &api.PrepareKeysetRequest{Scope: b.scope})
	if err != nil {
		return runbook.Keyset{}, mutation("", err)
	}
	return fromProto(resp.GetKeyset()), nil
}

// Activate implements runbook.Backend.
func (b *backend) Activate(ctx context.Context, id string) error {
	_, err := b.c.ActivateKeyset(ctx, &api.ActivateKeysetRequest{Scope: b.scope, KeysetId: id})
	return mutation(id, err)
}

// Taint implements runbook.Backend.
func (b *backend) Taint(ctx context.Context, id string) error {
	_, err := b.c.TaintKeyset(ctx, &api.TaintKeysetRequest{Scope: b.scope, KeysetId: id})
	return mutation(id, err)
}

// Remove implements runbook.Backend.
func (b *backend) Remove(ctx context.Context, id string, force bool) error {
	_, err := b.c.RemoveKeyset(ctx, &api.RemoveKeysetRequest{Scope: b.scope, KeysetId: id, Force: force})
	return mutation(id, err)
}

// plain is a server's error in its own words.
func plain(err error) error { return errors.New(status.Convert(err).Message()) }

// mutation says what an error means for a mutation: the codes of a refusal
// that changed nothing are its own words; with any other it may have happened.
func mutation(id string, err error) error {
	if err == nil {
		return nil
	}
	st := status.Convert(err)
	switch st.Code() {
	case codes.FailedPrecondition:
		for _, d := range st.Details() {
			if info, ok := d.(interface {
				GetReason() string
				GetDomain() string
			}); ok && info.GetReason() == reasonNotSafe && info.GetDomain() == errorDomain {
				return &runbook.NotSafeError{Keyset: id, Message: st.Message()}
			}
		}
		return errors.New(st.Message())
	case codes.NotFound, codes.Aborted, codes.InvalidArgument, codes.PermissionDenied, codes.Unauthenticated, codes.Unimplemented:
		return errors.New(st.Message())
	}
	return fmt.Errorf("%w: %s", runbook.ErrOutcomeUnknown, st.Message())
}
