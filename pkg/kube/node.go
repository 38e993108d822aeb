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
	return outOfService(n), nil
}

func outOfService(n *corev1.Node) bool {
	return slices.ContainsFunc(n.Spec.Taints, func(t corev1.Taint) bool { return t.Key == corev1.TaintNodeOutOfService })
}

// TopologyNode is a node whose kubelet has known the driver, as its topology label tells. The
// label stays while the driver is replaced or away.
type TopologyNode struct {
	// Name by which the driver knows the node.
	Name string
	// Ready: its kubelet answers, and nobody has said that it is out of service.
	Ready bool
}

// TopologyNodes are the nodes that carry a topology label of the driver, in no order.
func (c *Client) TopologyNodes(ctx context.Context, key string) ([]TopologyNode, error) {
	list, err := c.api.CoreV1().Nodes().List(ctx, metav1.ListOptions{LabelSelector: key})
	if err != nil {
		return nil, failed(err, "cannot list the Nodes with the label %s", key)
	}
	var out []TopologyNode
	for _, n := range list.Items {
		ready := slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
			return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
		})
		out = append(out, TopologyNode{Name: n.Labels[key], Ready: ready && !outOfService(&n)})
	}
	return out, nil
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
