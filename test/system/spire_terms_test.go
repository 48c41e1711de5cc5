package system_test

import (
	"context"
	"crypto/x509"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	bundlepb "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entrypb "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
)

// The attributes of entries that SPIRE servers keep since 1.15.0 and 1.15.2: an
// X.509-SVID that is minted only when asked for, and tokens with a jti.
func TestAttributesUnderSPIRE(t *testing.T) {
	t.Parallel()
	run(t, "spire-attribute-*.txtar", withSPIRE(t))
}

// A JWT authority is tainted and revoked: what becomes of the tokens that are held,
// with either jwt.tainted.
func TestTaintedTokensUnderSPIRE(t *testing.T) {
	t.Parallel()
	run(t, "spire-tokens.txtar", withSPIRE(t))
}

// audience is what the scripts ask tokens for.
const audience = "api"

type scriptKey struct{}

// spireEntry is the command "spire-entry SOCKET ID [TERM...]". It makes, or replaces,
// the entry of that ID for the processes of this user, through a SPIRE server's API.
// The test is skipped if the server is too old for an attribute and returns the entry
// without it.
func spireEntry(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: spire-entry SOCKET ID [disable_x509_svid_prefetch|jwt_svid_include_jti|x509_svid_ttl=DURATION|dns=NAME]...")
	}
	socket, id := args[0], args[1]
	attributes := &types.Entry_AdditionalAttributes{}
	e := &types.Entry{
		Id:                   id,
		ParentId:             &types.SPIFFEID{TrustDomain: "example.org", Path: "/node"},
		SpiffeId:             &types.SPIFFEID{TrustDomain: "example.org", Path: "/" + id},
		Selectors:            []*types.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", os.Getuid())}},
		AdditionalAttributes: attributes,
	}
	for _, term := range args[2:] {
		switch name, value, _ := strings.Cut(term, "="); name {
		case "disable_x509_svid_prefetch":
			attributes.DisableX509SvidPrefetch = true
		case "jwt_svid_include_jti":
			attributes.JwtSvidIncludeJti = true
		case "x509_svid_ttl":
			ttl, err := time.ParseDuration(value)
			ts.Check(err)
			e.X509SvidTtl = int32(ttl.Seconds())
		case "dns":
			e.DnsNames = []string{value}
		default:
			ts.Fatalf("no such term: %s", term)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	ts.Check(err)
	defer conn.Close()
	client := entrypb.NewEntryClient(conn)
	made, err := client.BatchCreateEntry(ctx, &entrypb.BatchCreateEntryRequest{Entries: []*types.Entry{e}})
	ts.Check(err)
	state, kept := made.Results[0].Status, made.Results[0].Entry
	if codes.Code(state.Code) == codes.AlreadyExists {
		changed, err := client.BatchUpdateEntry(ctx, &entrypb.BatchUpdateEntryRequest{Entries: []*types.Entry{e}})
		ts.Check(err)
		state, kept = changed.Results[0].Status, changed.Results[0].Entry
	}
	if state.Code != 0 {
		ts.Fatalf("entry %s: %s", id, state.Message)
	}
	if got := kept.GetAdditionalAttributes(); got.GetDisableX509SvidPrefetch() != attributes.DisableX509SvidPrefetch ||
		got.GetJwtSvidIncludeJti() != attributes.JwtSvidIncludeJti {
		ts.Check(ts.Exec("spire-server", "--version"))
		version := strings.TrimSpace(ts.ReadFile("stdout") + ts.ReadFile("stderr"))
		ts.Value(scriptKey{}).(testscript.T).Skip(fmt.Sprintf("spire-server %s does not keep the attributes %v of an entry, it keeps %v", version, attributes, got))
	}
}

// tokens are what a workload at an agent's socket is given:
//
//	tokens distinct SOCKET ID          twenty calls, some at once, are given tokens that differ, each with a jti
//	tokens same SOCKET ID              they are given one token, without a jti
//	tokens turn KEY SOCKET ID          a call is given a token by a key; of those that are given one by another key
//	                                   at most four come when that token may be replaced
//	tokens good KEY PORT SPIRE SOCKET ID
//	                                   each call is given a token that verifies by the bundle of the SPIRE server at
//	                                   its socket, until the agent with its metrics on a port knows the key no more
func tokens(ts *testscript.TestScript, neg bool, args []string) {
	ctx, cancel := context.WithTimeout(context.Background(), waitLimit)
	defer cancel()
	switch {
	case len(args) == 3 && (args[0] == "distinct" || args[0] == "same"):
		compareTokens(ctx, ts, args[0] == "distinct", args[1], args[2])
	case len(args) == 4 && args[0] == "turn":
		turn(ctx, ts, args[1], args[2], args[3])
	case len(args) == 6 && args[0] == "good":
		good(ctx, ts, args[1], args[2], args[3], args[4], args[5])
	default:
		ts.Fatalf("usage: tokens distinct|same SOCKET ID | turn KEY SOCKET ID | good KEY PORT SPIRE SOCKET ID")
	}
}

func fetchToken(ctx context.Context, socket, id string) (*jwtsvid.SVID, error) {
	subject, err := spiffeid.FromString("spiffe://example.org/" + id)
	if err != nil {
		return nil, err
	}
	return workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience, Subject: subject}, workloadapi.WithAddr("unix://"+socket))
}

func compareTokens(ctx context.Context, ts *testscript.TestScript, distinct bool, socket, id string) {
	const together, calls = 10, 20
	var got [calls]*jwtsvid.SVID
	var errs [calls]error
	var work sync.WaitGroup
	for i := range calls {
		if i < together {
			work.Go(func() { got[i], errs[i] = fetchToken(ctx, socket, id) })
			continue
		}
		work.Wait()
		got[i], errs[i] = fetchToken(ctx, socket, id)
	}
	all, ids := make(map[string]bool), make(map[string]bool)
	for i, svid := range got {
		ts.Check(errs[i])
		all[svid.Marshal()] = true
		if jti, _ := svid.Claims["jti"].(string); jti != "" {
			ids[jti] = true
		}
	}
	want, wantIDs := 1, 0
	if distinct {
		want, wantIDs = calls, calls
	}
	if len(all) != want || len(ids) != wantIDs {
		ts.Fatalf("%d calls were given %d tokens with %d IDs, want %d with %d", calls, len(all), len(ids), want, wantIDs)
	}
}

// A token of a tainted key is minted again at most every ten seconds, and its iat
// has whole seconds.
const replaceAge = 11 * time.Second

func turn(ctx context.Context, ts *testscript.TestScript, key, socket, id string) {
	const most = 4
	for old := 0; ; {
		svid, err := fetchToken(ctx, socket, id)
		ts.Check(err)
		if keyID(ts, svid) == key {
			ts.Logf("%d calls were given an old token that may be replaced", old)
			return
		}
		if issued, _ := svid.Claims["iat"].(float64); time.Since(time.Unix(int64(issued), 0)) > replaceAge {
			if old++; old > most {
				ts.Fatalf("%d calls were given a token of %s, want one of %s by now", old, keyID(ts, svid), key)
			}
		}
		time.Sleep(time.Second) // the pace of a caller
	}
}

func keyID(ts *testscript.TestScript, svid *jwtsvid.SVID) string {
	parsed, err := jose.ParseSignedCompact(svid.Marshal(), []jose.SignatureAlgorithm{jose.ES256, jose.ES384, jose.RS256})
	ts.Check(err)
	return parsed.Signatures[0].Header.KeyID
}

func good(ctx context.Context, ts *testscript.TestScript, key, port, server, socket, id string) {
	conn, err := grpc.NewClient("unix://"+server, grpc.WithTransportCredentials(insecure.NewCredentials()))
	ts.Check(err)
	defer conn.Close()
	client := bundlepb.NewBundleClient(conn)
	for calls := 1; ; calls++ {
		known := readStatus(ts, key, port).ID != ""
		svid, err := fetchToken(ctx, socket, id)
		ts.Check(err)
		published, err := client.GetBundle(ctx, &bundlepb.GetBundleRequest{})
		ts.Check(err)
		trusted := jwtbundle.New(svid.ID.TrustDomain())
		for _, k := range published.JwtAuthorities {
			public, err := x509.ParsePKIXPublicKey(k.PublicKey)
			ts.Check(err)
			ts.Check(trusted.AddJWTAuthority(k.KeyId, public))
		}
		if _, err := jwtsvid.ParseAndValidate(svid.Marshal(), trusted, []string{audience}); err != nil {
			ts.Fatalf("call %d was given a token that its verifier refuses: %v", calls, err)
		}
		if !known {
			ts.Logf("%d calls, each given a token that verifies", calls)
			return
		}
	}
}
