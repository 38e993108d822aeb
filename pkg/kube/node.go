package kube

import (
	"context"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// Node returns nil if there is a Node object of that name. fault.NotFound:
// there certainly is none.
func (c *Client) Node(ctx context.Context, name string) error {
	_, err := c.node(ctx, name)
	return err
}

// OutOfService says whether a Node carries the taint
// node.kubernetes.io/out-of-service, whatever its effect: by it an operator
// promises that the node is off and writes nothing any more. fault.NotFound:
// there is no such Node, which promises nothing.
func (c *Client) OutOfService(ctx context.Context, name string) (bool, error) {
	n, err := c.node(ctx, name)
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(n.Spec.Taints, func(t corev1.Taint) bool { return t.Key == corev1.TaintNodeOutOfService }), nil
}

func (c *Client) node(ctx context.Context, name string) (*corev1.Node, error) {
	// The client refuses to ask for some of these, with an error of no kind.
	if len(validation.IsDNS1123Subdomain(name)) > 0 {
		return nil, fault.New(fault.NotFound, "there is no Node %q: no Node can have that name", name)
	}
	n, err := c.api.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, failed(err, "cannot read the Node %s", name)
	}
	return n, nil
}
