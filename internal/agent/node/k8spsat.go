package node

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/renewd/renewd/internal/config"
)

const (
	// K8sPSATType is the name of the node attestor of Kubernetes' projected service
	// account tokens.
	K8sPSATType = "k8s_psat"
	// maxServiceAccountToken is the longest token accepted, in bytes. A cluster's has 1
	// to 2 KiB.
	maxServiceAccountToken = 64 << 10
	// maxExpiry is the end of year 9999, the last that RFC 3339 can express.
	maxExpiry = 253402300799
)

// K8sPSATConfig says which projected service account token attests the node.
type K8sPSATConfig struct {
	// Cluster is the name of the cluster at the server.
	Cluster string
	// TokenPath is the file in which the kubelet keeps the token current.
	TokenPath string
	// Audience must be one of the token's, so that a token that is good for the cluster's
	// API is not sent by mistake. Empty: any.
	Audience string
}

type k8sPSAT struct{ cfg K8sPSATConfig }

// K8sPSAT attests a node that is in a Kubernetes cluster by the projected service account
// token of the agent's pod. The payload is that of SPIRE's plugin k8s_psat (SPIRE 1.16,
// pkg/common/plugin/k8s), which sends no challenge. The server has the token reviewed;
// the agent only checks the audience.
func K8sPSAT(cfg K8sPSATConfig) Attestor { return k8sPSAT{cfg} }

func (k8sPSAT) Type() string { return K8sPSATType }

func (k k8sPSAT) Credential(context.Context) (*Credential, error) {
	b, err := readFile("token_path", k.cfg.TokenPath, maxServiceAccountToken)
	if err != nil {
		return nil, err
	}
	token := strings.TrimSpace(string(b))
	if token == "" {
		return nil, fmt.Errorf("token_path %s is empty: mount a projected service account token there", k.cfg.TokenPath)
	}
	claims, err := parseClaims(token)
	if err != nil {
		return nil, config.Permanent(fmt.Errorf("token_path %s: %w: mount a projected service account token there", k.cfg.TokenPath, err))
	}
	if k.cfg.Audience != "" && !slices.Contains(claims.Audience, k.cfg.Audience) {
		return nil, config.Permanent(fmt.Errorf("token_path %s holds a token for the audience %q instead of %q: set the audience of the projected volume, or that of node_attestation.k8s_psat",
			k.cfg.TokenPath, []string(claims.Audience), k.cfg.Audience))
	}
	payload, err := json.Marshal(struct {
		Cluster string `json:"cluster"`
		Token   string `json:"token"`
	}{k.cfg.Cluster, token})
	if err != nil {
		return nil, fmt.Errorf("encode the payload of k8s_psat: %w", err)
	}
	return &Credential{Payload: payload, About: claims.about(k.cfg.Cluster), ExpiresAt: claims.expiresAt()}, nil
}

// claims are those of a service account token that tell people what it is.
type claims struct {
	Audience   audience `json:"aud"`
	Expiry     float64  `json:"exp"`
	Kubernetes struct {
		Namespace string `json:"namespace"`
		Pod       struct {
			Name string `json:"name"`
		} `json:"pod"`
	} `json:"kubernetes.io"`
}

// about describes the token.
func (c *claims) about(cluster string) string {
	text := fmt.Sprintf("a token of cluster %q for audience %q", cluster, []string(c.Audience))
	if c.Kubernetes.Pod.Name != "" {
		text += fmt.Sprintf(", of pod %q in namespace %q", c.Kubernetes.Pod.Name, c.Kubernetes.Namespace)
	}
	if at := c.expiresAt(); !at.IsZero() {
		text += ", good until " + at.UTC().Format(time.RFC3339)
	}
	return text
}

// expiresAt returns the claim exp, zero when there is none.
func (c *claims) expiresAt() time.Time {
	if c.Expiry == 0 {
		return time.Time{}
	}
	return time.Unix(int64(min(max(c.Expiry, 0), maxExpiry)), 0)
}

// audience is the claim aud: one string or a list (RFC 7519, section 4.1.3).
type audience []string

func (a *audience) UnmarshalJSON(b []byte) error {
	var one string
	if json.Unmarshal(b, &one) == nil {
		*a = audience{one}
		return nil
	}
	return json.Unmarshal(b, (*[]string)(a))
}

// parseClaims reads the claims of a token without verifying it. The errors have nothing
// of the token.
func parseClaims(token string) (*claims, error) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 || strings.ContainsAny(token, "\r\n") { // which the decoder skips
		return nil, errors.New("the file holds no JWT")
	}
	var decoded [3][]byte
	for i, part := range parts {
		var err error
		if decoded[i], err = base64.RawURLEncoding.DecodeString(part); err != nil {
			return nil, errors.New("the file holds no JWT: a part of it is not base64url")
		}
	}
	var c claims
	if json.Unmarshal(decoded[1], &c) != nil {
		return nil, errors.New("the file holds no JWT: its claims are not those of a token")
	}
	return &c, nil
}
